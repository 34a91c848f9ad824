// Node's better-sqlite3: synchronous, in one process, with worker threads as readers.
//
//     better.js write DATABASE delete|wal    works with the database, prints what it holds
//     better.js read DATABASE delete|wal     prints what it holds, and must not be able to write

const { Worker, isMainThread, workerData } = require("node:worker_threads");
const Database = require("better-sqlite3");

const [mode, path, journal] = isMainThread ? process.argv.slice(2) : workerData;

function open(options) {
  // A write on a replica in WAL mode is refused as "database is locked", which is waited for.
  const timeout = mode === "write" ? 10000 : 200;
  const db = new Database(path, { timeout, ...options });
  db.pragma("synchronous = NORMAL");
  return db;
}

function summary(db) {
  const row = db.prepare("select count(*) n, sum(number) s, sum(length(data)) d from t").get();
  return [row.n, row.s, row.d].join(" ");
}

function write() {
  const db = open();
  db.pragma(`journal_mode = ${journal}`);
  db.exec("create table t(id integer primary key, number int unique, data blob)");
  const insert = db.prepare("insert into t(number, data) values (?, ?)");
  const many = db.transaction((from, to) => {
    for (let n = from; n < to; n++) insert.run(n, Buffer.alloc(50));
  });
  many(0, 1000);
  try {
    many(1000, 1001), many.immediate(990, 1100);
    throw new Error("a duplicate was taken");
  } catch (error) {
    if (error.code !== "SQLITE_CONSTRAINT_UNIQUE") throw error;
  }
  for (let n = 2000; n < 2050; n++) insert.run(n, Buffer.alloc(5));
  for (const row of db.prepare("select id from t where number % 100 = 0").all())
    db.prepare("delete from t where id = ?").run(row.id);
  db.pragma("wal_checkpoint(truncate)");
  db.exec("vacuum");
  insert.run(5000, Buffer.alloc(100000));
  return db;
}

function main() {
  if (!isMainThread) {
    const db = open({ readonly: true });
    const seen = summary(db);
    db.close();
    require("node:worker_threads").parentPort.postMessage(seen);
    return;
  }
  const db = mode === "write" ? write() : open();
  const found = summary(db);
  if (mode === "read") {
    let refused;
    try {
      db.prepare("insert into t(number) values (9999)").run();
    } catch (error) {
      refused = error;
    }
    if (!refused) throw new Error("a write on a replica was not refused");
    console.log("refused:", refused.code, refused.message);
  }
  const worker = new Worker(__filename, { workerData: [mode, path, journal] });
  worker.on("message", (seen) => {
    if (seen !== found) throw new Error(`a thread sees ${seen}, not ${found}`);
    db.close();
    console.log(found);
  });
}

main();
