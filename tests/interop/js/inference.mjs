// A client written from protocols/SPEC.md alone: opens a session, sends steps of hidden states, prints what comes back.
// One JSON object on its input: {addr, digest, blocks: [start, end], steps: [[tokens, hiddenSize, [floats...]], ...]}.
import { randomBytes } from 'node:crypto'
import { readFileSync } from 'node:fs'

// Node 20 lacks what js-libp2p 3 uses.
Promise.withResolvers ??= () => { const d = {}; d.promise = new Promise((y, n) => { d.resolve = y; d.reject = n }); return d }

const { createLibp2p } = await import('libp2p')
const { tcp } = await import('@libp2p/tcp')
const { noise } = await import('@chainsafe/libp2p-noise')
const { yamux } = await import('@chainsafe/libp2p-yamux')
const { multiaddr } = await import('@multiformats/multiaddr')

const asked = JSON.parse(readFileSync(0))
const node = await createLibp2p({ transports: [tcp()], connectionEncrypters: [noise()], streamMuxers: [yamux()] })

// -- protobuf and frames

function varint (value) {
  const bytes = []
  for (; value > 0x7f; value = Math.floor(value / 128)) bytes.push(value % 128 + 128)
  return Buffer.from([...bytes, value])
}
const number = (field, value) => value === 0 ? Buffer.alloc(0) : Buffer.concat([varint(field << 3), varint(value)])
const bytes = (field, value) => Buffer.concat([varint(field << 3 | 2), varint(value.length), value])
const message = (...fields) => Buffer.concat(fields)

function parse (data) { // field -> its last value: a number or bytes
  const found = {}
  let at = 0
  const next = () => {
    let value = 0
    for (let scale = 1; ; scale *= 128) {
      const byte = data[at++]
      value += (byte & 0x7f) * scale
      if (byte < 128) return value
    }
  }
  while (at < data.length) {
    const tag = next()
    if ((tag & 7) === 0) found[tag >> 3] = next()
    else if ((tag & 7) === 2) { const size = next(); found[tag >> 3] = data.subarray(at, at += size) } else throw new Error(`wire type ${tag & 7}`)
  }
  return found
}

// -- the conversation

const stream = await node.dialProtocol(multiaddr(asked.addr), '/petals/inference/1.0.0')
const iterator = stream[Symbol.asyncIterator]()
let buffer = Buffer.alloc(0)
async function take (size) {
  while (buffer.length < size) {
    const { done, value } = await iterator.next()
    if (done) throw new Error('the server ended the stream')
    buffer = Buffer.concat([buffer, value.subarray()])
  }
  const taken = buffer.subarray(0, size)
  buffer = buffer.subarray(size)
  return taken
}
async function reply () {
  let size = 0
  for (let scale = 1; ; scale *= 128) {
    const [byte] = await take(1)
    size += (byte & 0x7f) * scale
    if (byte < 128) break
  }
  const { 1: opened, 2: done, 3: error } = parse(await take(size))
  if (error) throw new Error(`the server says: ${parse(error)[2]}`)
  return opened ? { opened: parse(opened) } : { done: parse(done) }
}
const say = (request, payload = Buffer.alloc(0)) => stream.send(Buffer.concat([varint(request.length), request, payload]))

const FLOAT32 = 1
const length = asked.steps.reduce((sum, [tokens]) => sum + tokens, 0)
say(bytes(1, message(
  bytes(1, randomBytes(16)), bytes(2, Buffer.from(asked.digest)), number(3, asked.blocks[0]), number(4, asked.blocks[1]),
  number(5, 1), number(6, length), number(7, 5000))))
const { opened } = await reply()
if (opened[1] !== FLOAT32) throw new Error('this client reads float32 only')

const answers = []
let position = 0
for (const [step, [tokens, hiddenSize, values]] of asked.steps.entries()) {
  const shape = Buffer.concat([varint(1), varint(tokens), varint(hiddenSize)])
  const tensor = message(number(1, FLOAT32), bytes(2, shape))
  const payload = Buffer.alloc(values.length * 4)
  values.forEach((value, index) => payload.writeFloatLE(value, index * 4))
  say(bytes(2, message(number(1, step), number(2, position), bytes(4, tensor))), payload)
  const { done } = await reply()
  if ((done[1] ?? 0) !== step) throw new Error(`step ${done[1]} instead of ${step}`)
  const answer = await take(values.length * 4)
  answers.push(values.map((_, index) => answer.readFloatLE(index * 4)))
  position += tokens
}
say(bytes(3, Buffer.alloc(0)))
await stream.close()
console.log(JSON.stringify(answers))
await node.stop()
process.exit(0)
