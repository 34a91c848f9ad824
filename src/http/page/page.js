// The status page: asks /status once a second and shows what it says. Whatever comes from there is put
// in as text, never as HTML.
"use strict";

const PERIOD_MS = 1000;
const SAMPLES = 120;

const byId = (id) => document.getElementById(id);
const samples = [];
let before = null;

function row(cells) {
  const tr = document.createElement("tr");
  for (const cell of cells) {
    const td = document.createElement(cell.head ? "th" : "td");
    if (cell.link) {
      const a = document.createElement("a");
      a.href = cell.link;
      a.textContent = cell.text;
      td.append(a);
    } else {
      td.textContent = cell.text;
    }
    td.className = cell.style || "";
    tr.append(td);
  }
  return tr;
}

function fill(id, rows) {
  byId(id).querySelector("tbody").replaceChildren(...rows);
}

function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (bytes >= 1024 && unit < units.length - 1) {
    bytes /= 1024;
    unit += 1;
  }
  return `${unit ? bytes.toFixed(1) : bytes} ${units[unit]}`;
}

// Only what leads to a page: an address comes from another node's configuration.
function webLink(url) {
  return /^https?:\/\//.test(url) ? url : undefined;
}

function showNode(status) {
  const facts = [
    ["version", status.version],
    ["node id", status.nodeId],
    ["cluster", status.clusterId || "none yet"],
    ["candidate", status.candidate ? "yes" : "no"],
    ["data", status.path],
  ];
  const rows = facts.map(([name, text]) => row([{ head: true, text: name }, { text }]));
  if (status.primary) {
    const { hostname, advertiseUrl } = status.primary;
    const text = `${hostname} at ${advertiseUrl}`;
    rows.push(row([{ head: true, text: "primary" }, { text, link: webLink(advertiseUrl) }]));
  }
  fill("node", rows);
}

function showDatabases(databases) {
  const rows = databases.map((db) => {
    let state = db.failure ? `FAILED: ${db.failure}` : "ok";
    if (db.lostFound) state += `; ${db.lostFound} files in lost+found`;
    if (db.backupProblem) state += `, BACKUP STANDS STILL: ${db.backupProblem}`;
    const style = db.failure || db.backupProblem || db.lostFound ? "bad" : "";
    return row([
      { text: db.name },
      { text: db.position, style: "code" },
      { text: db.mode + (db.passthrough ? ", passthrough" : "") },
      { text: size(db.pageSize * db.pageCount) },
      { text: state, style },
    ]);
  });
  fill("databases", rows.length ? rows : [row([{ text: "none" }])]);
}

function showPeers(peers) {
  byId("peers-section").hidden = peers.length === 0;
  const since = (peer) => new Date(peer.sinceMs).toLocaleString();
  const cells = (peer) => [
    { text: peer.nodeId, style: "code" },
    { text: peer.address, style: "code" },
    { text: since(peer) },
  ];
  fill("peers", peers.map((peer) => row(cells(peer))));
}

// A replica's lag; on a primary, the transactions since the last look.
function sample(status) {
  if (status.role === "replica") {
    return { unit: "ms behind the primary", value: Math.max(status.lagMs ?? 0, 0) };
  }
  const txids = new Map();
  for (const db of status.databases) {
    txids.set(db.name, BigInt(`0x${db.position.split("/")[0]}`));
  }
  let made = 0;
  if (before) {
    for (const [name, txid] of txids) made += Number(txid - (before.get(name) ?? 0n));
  }
  before = txids;
  return { unit: "transactions a second", value: Math.max(made, 0) };
}

function showChart(status) {
  const { unit, value } = sample(status);
  samples.push(value);
  if (samples.length > SAMPLES) samples.shift();
  const most = Math.max(...samples, 1);
  const points = samples.map((value, index) => {
    const x = SAMPLES - samples.length + index;
    return `${x},${(38 - (value / most) * 36).toFixed(1)}`;
  });
  byId("chart").setAttribute("points", points.join(" "));
  byId("chart-title").textContent = `${value} ${unit} (most in two minutes: ${Math.max(...samples)})`;
}

function show(status) {
  const role = byId("role");
  if (role.className !== status.role) {
    samples.length = 0;
    before = null;
  }
  role.textContent = status.role === "unknown" ? "no primary known" : status.role;
  role.className = status.role;
  const failed = status.databases.filter((db) => db.failure).length;
  byId("notice").textContent = failed ? `${failed} failed` : "";
  document.title = `${location.host}: ${role.textContent}`;
  byId("name").textContent = `litefs on ${location.host}`;
  showNode(status);
  showChart(status);
  showDatabases(status.databases);
  showPeers(status.peers ?? []);
  byId("all").hidden = false;
}

async function ask() {
  const token = sessionStorage.getItem("token");
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const response = await fetch("/status", { headers, cache: "no-store" });
  byId("login").hidden = response.status !== 401;
  if (!response.ok) throw new Error(`${response.status} ${await response.text()}`);
  show(await response.json());
}

async function run() {
  try {
    await ask();
  } catch (error) {
    byId("notice").textContent = `no status: ${error.message}`;
  }
  setTimeout(run, PERIOD_MS);
}

byId("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", byId("token").value);
});
run();
