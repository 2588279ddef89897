// The chat page: keeps the conversation, sends it to /v1/chat/completions, shows tokens as they come.
// Text is only ever set as textContent, so nothing a model writes can become markup.
"use strict";

const get = (id) => document.getElementById(id);
const conversation = [];
let running = null;

function headers() {
  const key = get("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

function show(role, text) {
  const article = document.createElement("article");
  article.className = role;
  article.textContent = text;
  get("conversation").append(article);
  article.scrollIntoView({ block: "end" });
  return article;
}

function note(article, text) {
  const footer = document.createElement("footer");
  footer.textContent = text;
  article.append(footer);
}

// The data of each server-sent event of a response.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      const data = JSON.parse(line.slice(6));
      if (data.error) throw new Error(data.error.message);
      yield data;
    }
  }
}

function requestBody() {
  const system = get("system").value.trim();
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...conversation];
  const body = { messages, stream: true, stream_options: { include_usage: true } };
  if (get("temperature").value) body.temperature = Number(get("temperature").value);
  if (get("max-tokens").value) body.max_tokens = Number(get("max-tokens").value);
  return JSON.stringify(body);
}

async function answer() {
  const article = show("assistant", "");
  const text = document.createTextNode("");
  article.append(text);
  let began = 0;
  running = new AbortController();
  get("stop").hidden = false;
  get("send").disabled = true;
  try {
    const options = { method: "POST", headers: headers(), body: requestBody(), signal: running.signal };
    const response = await fetch("/v1/chat/completions", options);
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const { choices, usage } of events(response)) {
      const piece = choices[0]?.delta.content;
      if (piece) {
        began ||= performance.now();
        text.data += piece;
        article.scrollIntoView({ block: "end" });
      }
      if (usage) {
        const seconds = (performance.now() - began) / 1000;
        const rate = began && usage.completion_tokens > 1 ? (usage.completion_tokens - 1) / seconds : 0;
        note(article, `${usage.completion_tokens} tokens` + (rate ? `, ${rate.toFixed(1)} a second` : ""));
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") show("error", error.message);
  } finally {
    if (text.data) conversation.push({ role: "assistant", content: text.data });
    else {
      conversation.pop();
      article.remove();
    }
    running = null;
    get("stop").hidden = true;
    get("send").disabled = false;
  }
}

get("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = get("question").value.trim();
  if (!question || running) return;
  get("question").value = "";
  conversation.push({ role: "user", content: question });
  show("user", question);
  answer();
});
get("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    get("ask").requestSubmit();
  }
});
get("stop").addEventListener("click", () => running?.abort());
get("clear").addEventListener("click", () => {
  running?.abort();
  conversation.length = 0;
  get("conversation").replaceChildren();
});
async function showModel() {
  const response = await fetch("/v1/models", { headers: headers() });
  const { data } = await response.json();
  get("model").textContent = data?.[0].id ?? (response.status === 503 ? "is loading" : "");
  if (response.status === 503) setTimeout(showModel, 1000);
}
showModel();
