// What the page shows, asked for anew every few seconds; rows that stay keep their place in the focus order.

const EVERY_MS = 3000;
const table = document.querySelector("#series tbody");
const away = document.getElementById("away");

function text(element, value) {
  if (element.textContent !== value) element.textContent = value;
}

function link(address, label, className) {
  const a = document.createElement("a");
  a.href = address;
  a.textContent = label;
  if (className) a.className = className;
  return a;
}

function put(cell, ...parts) {
  const old = cell.querySelector("a"), now = parts.find((p) => p instanceof HTMLAnchorElement);
  if (old && now && old.getAttribute("href") === now.getAttribute("href") && parts.length === 1)
    text(old, now.textContent);
  else cell.replaceChildren(...parts);
}

function fill(row, s) {
  const cells = row.cells;
  const uid = link(`/series/${s.series_uid}`, s.series_uid, "uid");
  uid.title = s.series_uid;
  put(cells[0], uid);
  put(cells[1], s.patient_key ? link(`/patients/${s.patient_key}`, s.patient) : s.patient);
  text(cells[2], s.study);
  text(cells[3], s.tag);
  const state = document.createElement("span");
  state.className = `state ${s.state}`;
  state.textContent = s.stated;
  put(cells[4], state, s.reason ? ` ${s.reason}` : "");
  const meter = document.createElement("meter");
  meter.setAttribute("aria-label", "scored");
  meter.max = Math.max(s.expected ?? 0, s.received, 1);
  meter.value = s.scored;
  const of = s.expected && s.expected !== s.received ? ` of ${s.expected}` : "";
  put(cells[5], meter, ` ${s.scored} / ${s.received}${of}`);
  text(cells[6], s.quality);
  text(cells[7], s.covers);
  text(cells[8], s.notes);
  text(cells[9], s.arrived);
}

function blank() {
  const row = document.createElement("tr");
  for (const name of ["", "nowrap", "nowrap", "", "", "nowrap", "r", "", "", "nowrap"]) {
    const cell = row.insertCell();
    if (name) cell.className = name;
  }
  return row;
}

function show(now) {
  text(document.getElementById("at"), now.at);
  document.getElementById("health").replaceChildren(...now.health.map((h) => {
    const item = document.createElement("li"), name = document.createElement("strong");
    const said = document.createElement("span");
    item.className = h.fine ? "good" : "wrong";
    name.textContent = h.name;
    said.textContent = h.said;
    item.append(name, said);
    return item;
  }));
  now.today.forEach((t, k) => {
    const cells = document.getElementById("today").rows[k].cells;
    text(cells[1], t.series);
    text(cells[2], t.images);
  });
  const rows = new Map([...table.rows].map((row) => [row.dataset.uid, row]));
  now.series.forEach((s, k) => {
    const row = rows.get(s.series_uid) ?? blank();
    rows.delete(s.series_uid);
    row.dataset.uid = s.series_uid;
    fill(row, s);
    if (table.rows[k] !== row) table.insertBefore(row, table.rows[k] ?? null);
  });
  for (const row of rows.values()) row.remove();
  document.getElementById("none").hidden = now.series.length > 0;
}

async function look() {
  if (!document.hidden) {
    try {
      const answer = await fetch("/live.json", { redirect: "error" });
      if (!answer.ok) throw new Error();
      show(await answer.json());
      text(away, "");
    } catch {
      text(away, " The node does not answer, or you were signed out.");
    }
  }
  setTimeout(look, EVERY_MS);
}

setTimeout(look, EVERY_MS);
