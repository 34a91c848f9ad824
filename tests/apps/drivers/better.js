// Node's better-sqlite3, as its users work with it: one connection, prepared statements, transactions as functions.
//
//     better.js write DATABASE delete|wal    works with the database, prints what it holds
//     better.js read DATABASE delete|wal     prints what it holds, and must not be able to write
//
// DRIVER is where the driver stands.
const { join } = require('node:path');
const driver = process.env.DRIVER;
const Database = require(driver);

const [mode, path, journal] = process.argv.slice(2);

function connect() {
  // A write on a replica in WAL mode is refused as "database is locked", which is waited for.
  const timeout = mode === 'write' ? 10000 : 200;
  const nativeBinding = join(driver, 'build', 'Release', 'better_sqlite3.node');
  const db = new Database(path, { nativeBinding, timeout });
  db.pragma('foreign_keys = ON');
  return db;
}

function summary(db) {
  const row = db.prepare(
    'select count(*) n, sum(length(body)) bytes, max(name) last from post join author on author = author.id'
  ).get();
  return `${row.n} ${row.bytes} ${row.last}`;
}

function write() {
  const db = connect();
  db.pragma(`journal_mode = ${journal}`);
  db.exec(`
    create table author(id integer primary key, name text unique);
    create table post(id integer primary key, author references author on delete cascade, body);
    create index by_author on post(author)`);
  const author = db.prepare('insert into author(name) values (?)');
  const post = db.prepare('insert into post(author, body) values (@author, @body)');
  const publish = db.transaction((name, posts) => {
    const { lastInsertRowid } = author.run(name);
    for (const body of posts) post.run({ author: lastInsertRowid, body });
  });
  publish('ann', ['a', 'b', 'c']);
  publish('bob', Array.from({ length: 100 }, (_, i) => Buffer.alloc(i * 50)));
  // An exception rolls back, the inner transaction alone is a savepoint.
  const fails = db.transaction(() => { author.run('nobody'); throw new RangeError('of the test'); });
  try { fails(); } catch (error) { if (!(error instanceof RangeError)) throw error; }
  db.transaction(() => {
    author.run('eve');
    try { publish('ann', ['never']); } catch (error) {
      if (error.code !== 'SQLITE_CONSTRAINT_UNIQUE') throw error;
    }
    publish('zoe', ['one']);
  }).immediate();
  // A second connection reads row by row.
  const other = connect();
  let rows = 0;
  for (const row of other.prepare('select id from post').iterate()) rows += row.id > 0 ? 1 : 0;
  if (rows !== 104) throw new Error(`${rows} rows`);
  db.prepare("delete from author where name = 'eve'").run();
  db.exec('vacuum');
  const found = summary(other);
  other.close();
  db.close();
  return found;
}

function read() {
  const db = connect();
  const found = summary(db);
  try {
    db.prepare("insert into author(name) values ('refused')").run();
  } catch (error) {
    console.log('refused:', error.code);
    return found;
  }
  console.error('a write on a replica was not refused');
  process.exit(1);
}

console.log(mode === 'write' ? write() : read());
