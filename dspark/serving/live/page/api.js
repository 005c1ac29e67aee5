// What the page asks the server: JSON, and streams of server-sent events with a key, which the
// browser's own EventSource cannot send. The key lives in this variable alone.

let key = "";

export function useKey(given) {
  key = given;
}

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function open(path, { method = "GET", body, signal } = {}) {
  const headers = {};
  if (key) headers.authorization = `Bearer ${key}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  const sent = body === undefined ? undefined : JSON.stringify(body);
  const reply = await fetch(path, { method, headers, body: sent, signal, cache: "no-store" });
  if (reply.ok) return reply;
  let message = `The server answered with status ${reply.status}.`;
  try {
    message = (await reply.json()).error.message;
  } catch {
    // No JSON: a proxy in between has answered.
  }
  throw new ApiError(reply.status, message);
}

export async function ask(path, options) {
  return (await open(path, options)).json();
}

// Yields [name, object] for every event, and ends with the stream.
export async function* stream(path, options) {
  const reply = await open(path, options);
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value;
      const events = rest.split("\n\n");
      rest = events.pop();
      for (const event of events) yield parse(event);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parse(event) {
  let name = "message";
  let data = "";
  for (const line of event.split("\n")) {
    if (line.startsWith("event: ")) name = line.slice(7);
    if (line.startsWith("data: ")) data += line.slice(6);
  }
  return [name, data ? JSON.parse(data) : {}];
}
