// Completes the word before the caret; an error puts the caret where it is.

const MOST = 12;
const words = Object.entries(JSON.parse(document.getElementById("word-data").textContent));
const box = document.getElementById("q");
const list = document.getElementById("words");
let found = [], chosen = -1;

box.setAttribute("role", "combobox");
box.setAttribute("aria-autocomplete", "list");
box.setAttribute("aria-controls", "words");
box.setAttribute("aria-expanded", "false");

const before = () => /[A-Za-z_][A-Za-z0-9_]*$/.exec(box.value.slice(0, box.selectionStart))?.[0] ?? "";

function close() {
  list.hidden = true;
  chosen = -1;
  box.setAttribute("aria-expanded", "false");
  box.removeAttribute("aria-activedescendant");
}

function choose(k) {
  chosen = (k + found.length) % found.length;
  [...list.children].forEach((item, i) => item.setAttribute("aria-selected", String(i === chosen)));
  const item = list.children[chosen];
  box.setAttribute("aria-activedescendant", item.id);
  item.scrollIntoView({ block: "nearest" });
}

function open() {
  const word = before().toLowerCase();
  found = word ? words.filter(([w]) => w.toLowerCase().startsWith(word) && w !== word).slice(0, MOST) : [];
  if (!found.length) {
    close();
    return;
  }
  list.replaceChildren(...found.map(([usage, meaning], k) => {
    const item = document.createElement("li"), code = document.createElement("code");
    const said = document.createElement("span");
    item.id = `word-${k}`;
    item.setAttribute("role", "option");
    item.setAttribute("aria-selected", "false");
    code.textContent = usage;
    said.textContent = meaning;
    item.append(code, said);
    item.addEventListener("pointerdown", (e) => {
      e.preventDefault();
      take(k);
    });
    return item;
  }));
  list.hidden = false;
  box.setAttribute("aria-expanded", "true");
  choose(0);
}

/** Put a word in; of a function, the first argument is selected, to be written over. */
function take(k) {
  const [usage] = found[k], start = box.selectionStart - before().length;
  box.setRangeText(usage, start, box.selectionStart, "end");
  const inner = /\(([^,)=]*=?)/.exec(usage);
  if (inner) {
    const from = start + inner.index + 1 + (inner[1].endsWith("=") ? inner[1].length : 0);
    const to = inner[1].endsWith("=") ? start + usage.length - 1 : from + inner[1].length;
    box.setSelectionRange(from, to);
  }
  close();
  box.focus();
}

box.addEventListener("input", open);
box.addEventListener("blur", close);
box.addEventListener("keydown", (e) => {
  if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) {
    box.form.requestSubmit();
    return;
  }
  if (list.hidden) return;
  const acts = {
    ArrowDown: () => choose(chosen + 1),
    ArrowUp: () => choose(chosen - 1),
    Enter: () => take(chosen),
    Tab: () => take(chosen),
    Escape: close,
  };
  if (!acts[e.key]) return;
  e.preventDefault();
  acts[e.key]();
});

if (box.dataset.position !== undefined) {
  box.focus();
  const at = Number(box.dataset.position);
  box.setSelectionRange(at, at + 1);
}
