// A js-libp2p peer under test: prints its address, then answers one JSON command per line of its input.
import { createHash, randomBytes } from 'node:crypto'
import { createInterface } from 'node:readline'

// Node 20 lacks what js-libp2p 3 uses.
Promise.withResolvers ??= () => { const d = {}; d.promise = new Promise((y, n) => { d.resolve = y; d.reject = n }); return d }

const { createLibp2p } = await import('libp2p')
const { tcp } = await import('@libp2p/tcp')
const { noise } = await import('@chainsafe/libp2p-noise')
const { yamux } = await import('@chainsafe/libp2p-yamux')
const { ping } = await import('@libp2p/ping')
const { identify } = await import('@libp2p/identify')
const { circuitRelayServer, circuitRelayTransport } = await import('@libp2p/circuit-relay-v2')
const { kadDHT, passthroughMapper } = await import('@libp2p/kad-dht')
const { CID } = await import('multiformats/cid')
const { decode: decodeDigest } = await import('multiformats/hashes/digest')
const { multiaddr } = await import('@multiformats/multiaddr')


// xsalsa20 1.2.0, below @libp2p/pnet: its ciphers share one WebAssembly memory, and once pieces exceed a page each of a
// connection's two grows it anew whenever the other has, until Node dies. Without WebAssembly it takes its JavaScript.
const { WebAssembly } = globalThis
delete globalThis.WebAssembly
const { preSharedKey } = await import('@libp2p/pnet')
globalThis.WebAssembly = WebAssembly

const ECHO = '/test/echo/1'
const RESET = '/test/reset/1'
const PIECE = 65536

// A node that keeps our records, without knowing what they are.
const dht = () => kadDHT({
  protocol: '/ipfs/kad/1.0.0', clientMode: false, peerInfoMapper: passthroughMapper,
  validators: { petals: async () => {} }, selectors: { petals: () => 0 }
})
const relay = process.env.RELAY // whose calls are taken; "none": be one
const node = await createLibp2p({
  addresses: { listen: relay && relay !== 'none' ? [`${relay}/p2p-circuit`] : ['/ip4/127.0.0.1/tcp/0'] },
  transports: [tcp(), ...(relay ? [circuitRelayTransport()] : [])],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  ...(process.env.SWARM_KEY ? { connectionProtector: preSharedKey({ psk: Buffer.from(process.env.SWARM_KEY) }) } : {}),
  services: {
    ping: ping(),
    ...(relay || process.env.KADEMLIA ? { identify: identify() } : {}),
    ...(process.env.KADEMLIA ? { dht: dht() } : {}),
    ...(relay === 'none' ? { relay: circuitRelayServer() } : {})
  }
})

async function send (stream, data) {
  for (let start = 0; start < data.length; start += PIECE) {
    if (!stream.send(data.subarray(start, start + PIECE))) await stream.onDrain()
  }
}

// js-libp2p 3.3: `for await` over a stream now and then sleeps through an end that came together with the last bytes
// (readStatus and remoteWriteStatus are "closed", the iterator waits on). So look as well.
async function * pieces (stream) {
  const iterator = stream[Symbol.asyncIterator]()
  while (true) {
    let look
    const missed = new Promise((resolve) => {
      look = setInterval(() => {
        if (stream.remoteWriteStatus === 'closed' && stream.readBufferLength === 0) resolve({ done: true })
      }, 50)
    })
    const { done, value } = await Promise.race([iterator.next(), missed])
    clearInterval(look)
    if (done) return
    yield value
  }
}

async function echo (stream) {
  for await (const piece of pieces(stream)) await send(stream, piece.subarray())
  await stream.close()
}

async function reset (stream) {
  for await (const _ of stream) { stream.abort(new Error('as asked')); return }
}

const many = { maxInboundStreams: 1000, maxOutboundStreams: 1000, runOnLimitedConnection: true }
await node.handle(ECHO, echo, many)
await node.handle(RESET, (stream) => reset(stream).catch(() => {}), many)

async function ask (addr, size) {
  const stream = await node.dialProtocol(addr, ECHO, many)
  const data = randomBytes(size)
  const hash = createHash('sha256')
  let count = 0
  const reading = (async () => {
    for await (const piece of pieces(stream)) { hash.update(piece.subarray()); count += piece.length }
  })()
  await send(stream, data)
  await stream.close() // half: the other direction goes on
  await reading
  return count === size && hash.digest('hex') === createHash('sha256').update(data).digest('hex')
}

const cid = (hex) => CID.createV1(0x55, decodeDigest(Buffer.from(hex, 'hex')))
async function known (addr) { // in the routing table, once identify has said what it speaks
  const { remotePeer } = await node.dial(addr)
  while (await node.services.dht.routingTable.find(remotePeer) == null) {
    await new Promise((resolve) => setTimeout(resolve, 20))
  }
}

const commands = {
  provide: async (addr, key) => {
    await known(addr)
    for await (const _ of node.services.dht.provide(cid(key))) ;
    return true
  },
  find: async (addr, key) => {
    await known(addr)
    const found = new Set()
    for await (const event of node.services.dht.findProviders(cid(key))) {
      if (event.name === 'PROVIDER') event.providers.forEach((peer) => found.add(peer.id.toString()))
    }
    return [...found]
  },
  get: async (addr, key) => {
    await known(addr)
    for await (const event of node.services.dht.get(Buffer.from(key))) {
      if (event.name === 'VALUE') return Buffer.from(event.value).toString('hex')
    }
    return null
  },
  put: async (addr, { key, value }) => {
    await known(addr)
    const told = []
    for await (const event of node.services.dht.put(Buffer.from(key), Buffer.from(value, 'hex'))) {
      if (event.name === 'PEER_RESPONSE' && event.messageName === 'PUT_VALUE') told.push(event.from.toString())
    }
    return told
  },
  ping: async (addr) => await node.services.ping.ping(addr) >= 0,
  echo: async (addr) => await ask(addr, 16 << 20),
  many: async (addr) => (await Promise.all(Array.from({ length: 100 }, () => ask(addr, 50_000)))).every(Boolean),
  reset: async (addr) => {
    const stream = await node.dialProtocol(addr, RESET, many)
    const closed = new Promise((resolve) => stream.addEventListener('close', (event) => resolve(event.error != null)))
    stream.send(new Uint8Array(1))
    return await closed
  }
}

while (node.getMultiaddrs().length === 0) await new Promise((resolve) => setTimeout(resolve, 20))
console.log(JSON.stringify(node.getMultiaddrs()[0].toString()))
for await (const line of createInterface({ input: process.stdin })) {
  const { command, addr, argument } = JSON.parse(line)
  try {
    console.log(JSON.stringify(await commands[command](multiaddr(addr), argument)))
  } catch (error) {
    console.log(JSON.stringify(`${error.name}: ${error.message}`))
  }
}
await node.stop()
process.exit(0)
