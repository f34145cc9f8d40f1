// The page asks /api/expand and /api/search and draws the answers. Every text reaches the page as a text node, never as
// markup. The text looked up is kept in the address (?q=), so that a view can be shared.
"use strict";

const PAUSE_MS = 300; // of typing, after which the text is looked up
const TERMS = 20; // shown before "all"
const CHIPS = 8;
const LANGUAGES = { ko: "Korean", en: "English", other: "other" };

const form = document.getElementById("form");
const input = document.getElementById("q");
const results = document.getElementById("results");
const announcer = document.getElementById("status");
const limit = Number(document.body.dataset.limit);
const searches = document.body.dataset.searches === "yes";

let composing = false; // a syllable is being put together
let finishing = false; // Enter was pressed meanwhile
let timer = 0;
let looked = null; // the text that is shown or under way
let running = null; // AbortController of the request under way
let settled = true; // the address in the history is to stay; typing begins a new one

// Typing

input.addEventListener("compositionstart", () => {
  composing = true;
  clearTimeout(timer);
});
input.addEventListener("compositionend", () => {
  composing = false;
  if (finishing) setTimeout(settle); // after the browser has put the syllable in
  else lookUpSoon();
  finishing = false;
});
input.addEventListener("input", (event) => {
  if (!composing && !event.isComposing) lookUpSoon();
});
input.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && composing) {
    finishing = true; // this Enter ends the syllable; with it the text is complete
    event.preventDefault();
  } else if (event.key === "Escape" && !composing && input.value) {
    event.preventDefault();
    input.value = "";
    settle();
  }
});
form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!composing) settle();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && event.target !== input && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    input.focus();
    input.select();
  }
});
window.addEventListener("popstate", showAddress);

function lookUpSoon() {
  clearTimeout(timer);
  timer = setTimeout(() => {
    if (lookUp()) settled = false;
  }, PAUSE_MS);
}

function settle() {
  if (results.dataset.state === "failed") looked = null; // ask again
  lookUp();
  settled = true;
}

function showAddress() {
  input.value = new URLSearchParams(location.search).get("q") ?? "";
  lookUp({ keepAddress: true });
  settled = true;
}

// Asking

function lookUp({ keepAddress = false } = {}) {
  clearTimeout(timer);
  const text = input.value.trim();
  if (text === looked) return false;
  running?.abort();
  running = null;
  looked = text;
  document.title = text ? `${text} · soju explore` : "soju explore";
  if (!keepAddress) writeAddress(text);
  const length = [...text].length;
  if (!text) introduce();
  else if (length > limit) complain(`This text has ${count(length)} characters; at most ${count(limit)} are shown. Shorten it.`);
  else answer(text);
  return true;
}

function writeAddress(text) {
  const address = text ? addressOf(text) : location.pathname;
  if (address === location.pathname + location.search) return;
  if (settled) history.pushState(null, "", address);
  else history.replaceState(null, "", address);
}

async function answer(text) {
  const mine = (running = new AbortController());
  results.setAttribute("aria-busy", "true");
  try {
    const questions = [ask("/api/expand", text, mine.signal)];
    if (searches) questions.push(ask("/api/search", text, mine.signal));
    const [expansions, found] = await Promise.all(questions);
    if (running === mine) draw(expansions, found);
  } catch (error) {
    if (running === mine) complain(error.message);
  }
}

async function ask(path, text, signal) {
  let response;
  try {
    response = await fetch(`${path}?${new URLSearchParams({ q: text })}`, { signal });
  } catch {
    throw new Error("soju does not answer. Is it still running in its terminal?");
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(sentence(answer.error ?? `soju answered with status ${response.status}`));
  return answer;
}

// Drawing

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value !== null && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null)); // strings become text nodes
  return element;
}

function show(state, message, ...children) {
  results.replaceChildren(...children);
  results.removeAttribute("aria-busy");
  results.dataset.state = state;
  announcer.textContent = message;
}

function introduce() {
  const section = document.getElementById("introduction").content.cloneNode(true);
  for (const link of section.querySelectorAll("a")) {
    link.lang = languageOf(link.textContent);
    link.href = addressOf(link.textContent);
    link.addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return; // a new tab
      event.preventDefault();
      input.value = link.textContent;
      settle();
    });
  }
  show("empty", "", section);
}

function complain(message) {
  show("failed", "", make("p", { class: "message", role: "alert" }, message));
}

function draw(expansions, found) {
  const two = expansions.models.length > 1;
  const notes = document.getElementById("notes").content.querySelectorAll(".note-of");
  const panels = expansions.models.map((model, place) => {
    const search = found?.models.find((item) => item.model === model.model) ?? null;
    return make(
      "section",
      { class: `panel${search ? " found" : ""}`, "aria-label": model.model },
      two ? make("h2", {}, model.model) : null,
      drawExpansion(model, notes[place].textContent),
      search ? drawSearch(search) : null,
    );
  });
  const summary = expansions.models.map((model) => {
    const hits = found?.models.find((item) => item.model === model.model)?.hits.length;
    return `${model.model}: ${count(model.active_terms)} terms${hits === undefined ? "" : `, ${hits} hits`}`;
  });
  show(
    "shown",
    summary.join("; "),
    document.getElementById("legend").content.cloneNode(true),
    make("div", { class: `panels ${two ? "two" : "one"}` }, ...panels),
  );
}

function drawExpansion(model, note) {
  const total = model.active_terms === 1 ? "1 term" : `${count(model.active_terms)} terms`;
  const head = make("h3", {}, "Expansion", make("span", {}, total));
  if (!model.terms.length) {
    return make("div", {}, head, make("p", { class: "nothing" }, "The model knows no term of this text."));
  }
  const heaviest = Math.max(...model.terms.map((term) => term.weight));
  const body = make("tbody");
  const rows = (terms) => terms.map((term) => drawTerm(term, heaviest));
  body.append(...rows(model.terms.slice(0, TERMS)));
  const part = make(
    "div",
    {},
    head,
    drawShares(model.languages),
    make("table", { class: "bars", "aria-label": `Terms of ${model.model}, heaviest first` }, body),
  );
  const left = model.terms.length - TERMS;
  if (left > 0) part.append(makeMore(left, "terms", () => body.append(...rows(model.terms.slice(TERMS)))));
  if (note) part.append(make("p", { class: "note-of" }, note));
  return part;
}

function drawShares(languages) {
  const words = languages.map((item) => `${LANGUAGES[item.language]} ${Math.round(100 * item.share)} %`).join(", ");
  const bar = make("div", { class: "shares", role: "img", "aria-label": `Weight: ${words}`, title: `Weight: ${words}` });
  for (const item of languages) {
    const piece = make("span", { class: item.language });
    piece.style.flexGrow = 100 * item.share;
    bar.append(piece);
  }
  return bar;
}

function drawTerm(term, heaviest) {
  const bar = make("span");
  bar.style.width = `${heaviest > 0 ? Math.max(0, (100 * term.weight) / heaviest) : 0}%`;
  return make(
    "tr",
    { class: term.language },
    make(
      "th",
      { scope: "row", lang: spoken(term.language), class: term.in_text ? "own" : null },
      term.term,
      term.only_here ? mark("only this model") : null,
    ),
    make("td", { class: "bar" }, bar, make("span", { class: "unseen" }, LANGUAGES[term.language])),
    make("td", { class: "number" }, weight(term.weight)),
  );
}

function drawSearch(search) {
  if (!search.hits.length) {
    return make("div", {}, make("h3", {}, "Hits"), make("p", { class: "nothing" }, "Nothing shares a term with this text."));
  }
  const head = make("h3", {}, "Hits", make("span", {}, "query × document = contribution"));
  return make("div", {}, head, make("ol", { class: "hits" }, ...search.hits.map(drawHit)));
}

function drawHit(hit) {
  const chips = make("ul", { class: "chips", "aria-label": "Matched terms" }, ...hit.matched.slice(0, CHIPS).map(drawChip));
  const left = hit.matched.length - CHIPS;
  if (left > 0) {
    const item = make("li", { class: "rest" });
    item.append(makeMore(left, "terms", () => item.before(...hit.matched.slice(CHIPS).map(drawChip)), item));
    chips.append(item);
  }
  return make(
    "li",
    {},
    make(
      "p",
      { class: "rank" },
      make("b", {}, String(hit.rank)),
      make("span", { class: "id" }, hit.document_id, hit.only_here ? mark("only this model found it") : null),
      make("span", { class: "score", title: "Sum of the contributions" }, hit.score.toFixed(3)),
    ),
    make("p", { class: "passage", lang: languageOf(hit.passage) }, ...hit.parts.map(drawPart)),
    chips,
  );
}

function drawPart(part) {
  if (part.term === null) return part.text;
  const strong = part.share >= 0.05 ? "strong " : "";
  return make("mark", { class: strong + part.language, title: `${part.term}: ${Math.round(100 * part.share)} % of the score` }, part.text);
}

function drawChip(match) {
  return make(
    "li",
    { class: match.language },
    make("b", { lang: spoken(match.language), class: match.in_query ? "own" : null }, match.term),
    " ",
    make("abbr", { title: LANGUAGES[match.language] }, match.language),
    " ",
    make("span", {}, `${digits(match.query_weight)} × ${digits(match.document_weight)} = ${digits(match.contribution)}`),
  );
}

function makeMore(left, what, open, container = null) {
  const button = make("button", { class: "more", type: "button" }, `${count(left)} more ${what}`);
  button.addEventListener("click", () => {
    open();
    (container ?? button).remove();
  });
  return button;
}

function mark(meaning) {
  return make("span", { class: "only", title: meaning }, make("span", { "aria-hidden": "true" }, "◆"), make("span", { class: "unseen" }, ` ${meaning}`));
}

// Writing

const count = (number) => number.toLocaleString("en-US");
const addressOf = (text) => `/?${new URLSearchParams({ q: text })}`;
const digits = (number) => (Math.abs(number) < 0.001 ? "<\u00a00.001" : Math.abs(number) < 1000 ? number.toPrecision(3) : number.toFixed(0));
const weight = (number) => number.toFixed(2).replace("-", "−");
const spoken = (language) => (language === "other" ? null : language);
const languageOf = (text) => (/[\u1100-\u11ff\u3130-\u318f가-힣]/.test(text) ? "ko" : "en");
const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.?!]$/.test(text) ? "" : ".");

showAddress();
if (!matchMedia("(pointer: coarse)").matches) input.focus({ preventScroll: true }); // on a phone the keyboard would cover the page
