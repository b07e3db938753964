// One chat completion as a stream of events: {text}, {route}, {finish}.

/** Ask; yields what comes. Throws an Error whose message is for people. */
export async function* chat(request, key, signal) {
  const headers = { "content-type": "application/json" };
  if (key) headers.authorization = `Bearer ${key}`;
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_route: true } });
  let response;
  try {
    response = await fetch("/v1/chat/completions", { method: "POST", headers, body, signal });
  } catch (error) {
    throw signal.aborted ? error : new Error("This peer can not be reached.");
  }
  if (!response.ok) throw new Error(await reason(response));
  let ended = false;
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") {
        ended = true;
        break;
      }
      const told = JSON.parse(data);
      if (told.error) throw new Error(told.error.message);
      if (told.petals) yield { route: told.petals };
      for (const choice of told.choices ?? []) {
        if (choice.delta?.content) yield { text: choice.delta.content };
        if (choice.finish_reason) yield { finish: choice.finish_reason };
      }
    }
  } catch (error) {
    throw error instanceof TypeError && !signal.aborted ? new Error("The connection to this peer was lost.") : error;
  }
  if (!ended) throw new Error("The answer was cut off.");
}

async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `This peer answered with status ${response.status}.`;
  }
}

/** The data of server-sent events, however the network sliced them. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) return;
      buffer += value;
      let end;
      while ((end = buffer.indexOf("\n\n")) >= 0) {
        const event = buffer.slice(0, end);
        buffer = buffer.slice(end + 2);
        if (event.startsWith("data: ")) yield event.slice(6);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
