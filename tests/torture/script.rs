//! What the client does, what it was told, and what it may find afterwards.
//!
//! Each commit adds a row with its own number, or replaces everything. What was reported as done must be
//! there after a restart; what failed may be there; nothing else.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use litefs::engine::db::DbState;
use litefs::engine::halt::HaltId;
use litefs::engine::layout::{DataDir, DbDir};
use litefs::engine::{
    self, Db, DbName, Engine, Event, EventWatch, LtxBytes, Next, Overlap, PrimaryInfo, Role,
};
use litefs::os;
use litefs::os::fault::Watching;
use ltx::{Compression, NodeId, Pos};
use rusqlite::Connection;

use super::acts;
use super::client::{Client, Pages};
use super::disk::{Disk, Ended, Plan, Recorder, Step};
use super::lent::Lender;
use super::ram_dir;
use crate::support::image::{self, Image};
use crate::support::wait;

pub const DB: &str = "db";
/// The other database of a transaction over two.
pub const TWO: &str = "two";
/// Rows of the other database have so much higher numbers here.
const OF_TWO: usize = 1_000_000;

/// How the client uses SQLite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mode {
    pub journal: &'static str,
    pub synchronous: &'static str,
    pub passthrough: bool,
}

impl Mode {
    pub const fn new(journal: &'static str, synchronous: &'static str, passthrough: bool) -> Mode {
        Mode { journal, synchronous, passthrough }
    }

    pub fn is_wal(self) -> bool {
        self.journal == "wal"
    }
}

/// One thing that the client does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// The tables are made.
    Begin,
    /// A commit of a few pages.
    Insert,
    /// A commit of more pages than the cache has.
    Large,
    /// The same, rolled back.
    RolledBack,
    /// A commit that makes the database smaller.
    Shrink,
    /// A commit that writes all pages.
    Vacuum,
    /// A checkpoint of this kind.
    Checkpoint(&'static str),
    /// A commit right after others, before the LTX files of those are written.
    Burst,
    /// The connection is closed, which ends the WAL, and made again.
    Reconnect,
    /// Old LTX files go.
    Retain,
    /// The database is replaced from outside.
    Import,
    /// The database is removed, and made again.
    Drop,
    /// The database is copied out.
    Export,
    /// The journal mode becomes this one.
    Switch(&'static str),
    /// The node is stopped and started.
    Restart,
    /// A commit that is refused because its next call with this label fails.
    Refused(&'static str),
    /// A commit that is reported as done although its next call with this label fails.
    Unseen(&'static str),
    /// Nothing, until writers are let in again.
    Mended,
    /// The client dies in the middle of a transaction, with pages in the database file.
    Dies,
    /// A commit in two databases.
    Both,
    /// A backup gets what it lacks, or gives it back.
    Backup,
    /// The backup gives back what was lost.
    Restore,
    /// The same as [`Act::Backup`] fails because its next call with this label does.
    NoBackup(&'static str),
    /// The database is replaced through the HTTP API.
    Upload,
    /// It is copied out through that.
    Download,
    /// A replica gets a stream of what it lacks.
    Follow,
    /// The node gets a cluster id.
    Join,
    /// The node gets the HALT lock, or gives it back.
    Borrow,
    GiveBack,
}

/// What the client began, by its number; its row has that number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// A row more.
    Row,
    /// A row more in each of two databases, or in none.
    RowInBoth,
    /// The same, but the one may have it and the other not.
    RowInEach,
    /// Only this row.
    Only,
    /// Nothing at all.
    Nothing,
    /// The disk was lost: what was there is to come back.
    Lost,
    /// It is back.
    Back,
    /// The rows as they are.
    Same,
}

/// Frames that a client writes to the WAL of a node that is gone.
#[derive(Debug, Clone)]
pub struct Late {
    pub offset: u64,
    pub frames: Vec<u8>,
}

/// A node with a client.
pub struct World {
    pub root: tempfile::TempDir,
    pub recorder: Arc<Recorder>,
    watching: Option<Watching>,
    pub engine: Arc<Engine>,
    client: Option<Client>,
    connection: Option<Connection>,
    mode: Mode,
    pub effects: Vec<Effect>,
    pub positions: Arc<Mutex<BTreeSet<(u64, u64)>>>,
    events: Option<EventWatch>,
    /// Where a replica was when it last got a stream.
    pub streamed: Pos,
    /// The primary that lends this node its database.
    pub lender: Option<Lender>,
    /// Nothing more is done.
    is_over: bool,
}

/// A node that refused to start.
pub struct NotStarted {
    pub root: tempfile::TempDir,
    pub recorder: Arc<Recorder>,
    pub reason: String,
}

/// The data directory below the directory that is watched.
pub fn data(root: &Path) -> PathBuf {
    root.join("data")
}

/// An engine on a data directory.
pub fn open(root: &Path, node: u64) -> engine::Result<Arc<Engine>> {
    Engine::open(engine::Options {
        dir: data(root),
        compression: Compression::Lz4,
        retention: Duration::ZERO,
        retention_interval: Duration::ZERO,
        retain: engine::Retain::Free,
        strict_verify: true,
        node_id: NodeId(node),
        clock: Box::new(|| 1),
    })
}

pub fn follow(engine: &Engine) {
    let info = PrimaryInfo { hostname: String::new(), advertise_url: String::new() };
    engine.set_role(Role::Replica(info));
}

impl World {
    /// A node on what a disk holds. Its start is part of what is recorded, and may fail.
    pub fn start(
        mode: Mode,
        disk: &Disk,
        effects: Vec<Effect>,
        trouble: Option<Plan>,
    ) -> Result<World, NotStarted> {
        World::start_with(mode, disk, effects, trouble, None)
    }

    /// The same, while a client of the node before may write to the WAL; that is the last effect.
    pub fn start_with(
        mode: Mode,
        disk: &Disk,
        effects: Vec<Effect>,
        trouble: Option<Plan>,
        late: Option<&Late>,
    ) -> Result<World, NotStarted> {
        let root = ram_dir();
        disk.store(root.path());
        let (recorder, watching) = Recorder::start(root.path(), trouble);
        if let Some(Late { offset, frames }) = late.cloned() {
            let path = DataDir::new(&data(root.path())).database(DB).wal();
            let wal = fs::File::options().write(true).open(path).unwrap();
            let (of_hook, number) = (recorder.clone(), effects.len() - 1);
            recorder.before_next("fence:rename", move || {
                of_hook.note(Step::Begin(number));
                let _ = os::write_at("client:late", &wal, &frames, offset);
            });
        }
        let engine = match open(root.path(), 1) {
            Ok(engine) => engine,
            Err(error) => {
                let reason = engine::chain_text(&error);
                return Err(NotStarted { root, recorder, reason });
            }
        };
        let mut world = World::with(root, recorder, Some(watching), engine, mode);
        world.effects = effects;
        world.lead();
        Ok(world)
    }

    /// A node that nobody uses yet.
    pub fn with(
        root: tempfile::TempDir,
        recorder: Arc<Recorder>,
        watching: Option<Watching>,
        engine: Arc<Engine>,
        mode: Mode,
    ) -> World {
        World {
            root,
            recorder,
            watching,
            engine,
            client: None,
            connection: None,
            mode,
            effects: Vec::new(),
            positions: Arc::default(),
            events: None,
            streamed: Pos::ZERO,
            lender: None,
            is_over: false,
        }
    }

    /// A client comes to a node that is no primary.
    pub fn connect(&mut self) {
        self.client = Some(Client::new(&self.engine));
    }

    /// The engine that was opened becomes primary, and a client may come.
    fn lead(&mut self) {
        self.engine.mounted(Arc::new(Pages), self.mode.passthrough);
        self.engine.set_role(Role::Primary);
        for db in self.engine.databases() {
            self.positions.lock().unwrap().insert(key(db.pos()));
        }
        let positions = self.positions.clone();
        self.events = Some(self.engine.watch_events(Box::new(move |event| {
            if let Event::Tx { pos, .. } = event {
                positions.lock().unwrap().insert(key(*pos));
            }
        })));
        self.client = Some(Client::new(&self.engine));
    }

    /// Opens the node again, which has been closed.
    pub fn open_again(&mut self) -> engine::Result<()> {
        self.engine = open(self.root.path(), 1)?;
        self.lead();
        Ok(())
    }

    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// The connection is closed.
    pub fn disconnect(&mut self) {
        self.connection = None;
    }

    /// The process of the client is killed.
    pub fn kill(&mut self) {
        if let (Some(client), Some(connection)) = (&self.client, self.connection.take()) {
            client.kill(connection);
        }
    }

    pub fn db(&self) -> Option<Arc<Db>> {
        self.engine.database(DB)
    }

    pub fn connection(&mut self) -> Result<&Connection, String> {
        if self.connection.is_none() {
            let text = |error: rusqlite::Error| error.to_string();
            let connection = self.client.as_ref().unwrap().connect(DB).map_err(text)?;
            connection
                .execute_batch(&format!(
                    "PRAGMA page_size = 1024; PRAGMA temp_store = memory; PRAGMA cache_size = 8; \
                     PRAGMA synchronous = {}; PRAGMA wal_autocheckpoint = 0",
                    self.mode.synchronous
                ))
                .map_err(text)?;
            let journal = self.mode.journal;
            let pragma = format!("PRAGMA journal_mode = {journal}");
            let set: String = connection.query_row(&pragma, [], |row| row.get(0)).map_err(text)?;
            if set != journal {
                return Err(format!("journal mode {set}"));
            }
            self.connection = Some(connection);
        }
        Ok(self.connection.as_ref().unwrap())
    }

    pub fn sql(&mut self, sql: &str) -> Result<(), String> {
        let connection = self.connection()?;
        let result = connection.execute_batch(sql).map_err(|error| error.to_string());
        if result.is_err() && !connection.is_autocommit() {
            // As an application does.
            if connection.execute_batch("ROLLBACK").is_err() && !connection.is_autocommit() {
                self.connection = None;
            }
        }
        result
    }

    /// Begins something with this effect, whose number `call` is given; whether it was done.
    pub fn act_with(
        &mut self,
        effect: Effect,
        call: impl FnOnce(&mut World, usize) -> Result<(), String>,
    ) -> Result<(), String> {
        let number = self.effects.len();
        self.effects.push(effect);
        self.note(Step::Begin(number));
        let result = call(self, number);
        let ended = if result.is_ok() { Ended::Done } else { Ended::Refused };
        self.note(Step::End(number, ended));
        result
    }

    fn note(&self, step: Step) {
        self.note_to_lender(step.clone());
        self.recorder.note(step);
    }

    /// Does one thing; an error is what the client was told.
    pub fn act(&mut self, act: Act) -> Result<(), String> {
        if self.is_over {
            return Err("nothing can be done".to_owned());
        }
        self.renew();
        let done = match act {
            Act::Begin => self.begin(),
            Act::Insert | Act::Burst => self.act_with(Effect::Row, |world, n| {
                world.sql(&format!("BEGIN IMMEDIATE; {}; COMMIT", row(n, 700)))
            }),
            Act::Large => self.act_with(Effect::Row, |world, n| {
                world.sql(&format!(
                    "BEGIN IMMEDIATE; {}; WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 \
                     FROM c WHERE x < 40) INSERT INTO filler SELECT printf('%0900d', x + {n}) FROM \
                     c; UPDATE filler SET x = x || '{n}'; COMMIT",
                    row(n, 10)
                ))
            }),
            Act::Borrow => self.act_with(Effect::Same, |world, _| world.borrow()),
            Act::GiveBack => self.act_with(Effect::Same, |world, _| {
                world.give_back();
                Ok(())
            }),
            Act::RolledBack => self.act_with(Effect::Same, |world, n| {
                world.sql(&format!(
                    "BEGIN IMMEDIATE; {}; UPDATE filler SET x = 'x{n}' || x; DELETE FROM t; \
                     ROLLBACK",
                    row(n, 10)
                ))
            }),
            Act::Shrink => self.act_with(Effect::Row, |world, n| {
                world.sql(&format!(
                    "BEGIN IMMEDIATE; {}; DELETE FROM filler; PRAGMA incremental_vacuum; COMMIT",
                    row(n, 10)
                ))
            }),
            Act::Vacuum => self.act_with(Effect::Same, |world, _| world.sql("VACUUM")),
            Act::Checkpoint(kind) => self.act_with(Effect::Same, |world, _| {
                let sql = format!("PRAGMA wal_checkpoint({kind})");
                let connection = world.connection()?;
                let busy = connection.query_row(&sql, [], |row| row.get::<_, i64>(0));
                match busy.map_err(|error| error.to_string())? {
                    0 => Ok(()),
                    _ => Err("busy".to_owned()),
                }
            }),
            Act::Reconnect => self.act_with(Effect::Same, |world, _| {
                world.connection = None;
                world.connection().map(drop)
            }),
            Act::Retain => self.act_with(Effect::Same, |world, _| {
                let db = world.db().ok_or("no database")?;
                let removed = db.retain(Duration::ZERO, None);
                removed.map(drop).map_err(|error| engine::chain_text(&error))
            }),
            Act::Import => self.act_with(Effect::Only, |world, n| world.import(n)),
            Act::Drop => self.drop_database(),
            Act::Export => self.act_with(Effect::Same, |world, _| {
                let db = world.db().ok_or("no database")?;
                let text = |error: engine::Error| engine::chain_text(&error);
                db.export(&mut Vec::new()).map_err(text)?;
                db.snapshot(&mut Vec::new()).map(drop).map_err(text)
            }),
            Act::Switch(journal) => self.act_with(Effect::Same, |world, _| {
                world.mode.journal = journal;
                let sql = format!("PRAGMA journal_mode = {journal}");
                let set: Result<String, _> =
                    world.connection()?.query_row(&sql, [], |row| row.get(0));
                match set.map_err(|error| error.to_string())? {
                    set if set == journal => Ok(()),
                    set => Err(format!("journal mode {set}")),
                }
            }),
            Act::Restart => self.act_with(Effect::Same, |world, _| world.begin_again()),
            Act::Refused(label) => match self.insert_with(label) {
                (Ok(()), _) => Err("was not refused".to_owned()),
                (Err(error), false) => Err(error),
                (Err(_), true) => Ok(()),
            },
            Act::Unseen(label) => match self.insert_with(label) {
                (Ok(()), false) => Err("nothing has failed".to_owned()),
                (told, _) => told,
            },
            Act::Mended => self.act_with(Effect::Same, |world, _| world.wait_for_writers()),
            Act::Dies => self.die(),
            Act::Both => self.insert_in_both(),
            Act::Restore => self.act_with(Effect::Back, |world, _| {
                // Nobody writes before it is there.
                let dir = world.root.path().join(BACKUP);
                let told = acts::back_up(&world.engine, &dir);
                world.is_over = told.is_err() && acts::back_up(&world.engine, &dir).is_err();
                told
            }),
            Act::Backup => self.act_with(Effect::Same, |world, _| {
                acts::back_up(&world.engine, &world.root.path().join(BACKUP))
            }),
            Act::NoBackup(label) => self.act_with(Effect::Same, |world, _| {
                world.recorder.stage(label);
                let told = acts::back_up(&world.engine, &world.root.path().join(BACKUP));
                let is_left = world.recorder.unstage();
                match (told, is_left) {
                    (Ok(()), _) => Err("was not refused".to_owned()),
                    (Err(error), true) => Err(error),
                    (Err(_), false) => Ok(()),
                }
            }),
            Act::Upload => self.act_with(Effect::Only, |world, n| {
                let source = import_file(n);
                acts::upload(&world.engine, &source.path().join("import"))
            }),
            Act::Download => self.act_with(Effect::Same, |world, _| {
                let bytes = acts::download(&world.engine)?;
                let copy = ram_dir();
                fs::write(copy.path().join("db"), bytes).unwrap();
                read_rows(&copy.path().join("db")).map(drop).expect("a healthy copy");
                Ok(())
            }),
            Act::Follow => self.act_with(Effect::Same, |world, _| world.serve_a_stream()),
            Act::Join => self.act_with(Effect::Same, |world, _| world.join()),
        };
        if act != Act::Burst {
            self.settle();
        }
        self.catch_up();
        done
    }

    /// Makes the tables.
    pub fn begin(&mut self) -> Result<(), String> {
        self.act_with(Effect::Same, |world, _| {
            world.sql(
                "PRAGMA auto_vacuum = incremental; BEGIN IMMEDIATE; \
                 CREATE TABLE IF NOT EXISTS t (n INTEGER PRIMARY KEY, x); \
                 CREATE TABLE IF NOT EXISTS filler (x); COMMIT",
            )
        })?;
        self.settle();
        Ok(())
    }

    fn import(&mut self, number: usize) -> Result<(), String> {
        let source = import_file(number);
        // Who is connected would have to finish first.
        let name = DbName::new(DB).unwrap();
        let imported = self.engine.import(&name, &source.path().join("import"));
        imported.map(drop).map_err(|error| engine::chain_text(&error))
    }

    fn drop_database(&mut self) -> Result<(), String> {
        self.connection = None;
        let dropped = self.act_with(Effect::Nothing, |world, _| {
            let db = world.db().ok_or("no database")?;
            db.drop_database().map_err(|refusal| format!("{refusal:?}"))
        });
        self.settle();
        let made = self.begin();
        dropped.and(made)
    }

    /// Writes what was captured. If that fails writers are refused.
    pub fn settle(&self) {
        if let Some(db) = self.db() {
            let _ = db.chain().flush();
        }
    }

    /// Waits until the node takes writers again.
    /// One that is lost until a restart or an import is not waited for.
    pub fn wait_until_mended(&mut self) -> Result<(), String> {
        self.recorder.calm();
        if self.is_over {
            return Ok(());
        }
        let end = Instant::now() + wait::DEADLINE;
        loop {
            let Err(error) = self.sql("BEGIN IMMEDIATE; COMMIT") else { return Ok(()) };
            let state = self.db().map(|db| (db.state(), db.received_pos()));
            if state.as_ref().is_none_or(|(_, received)| received.is_zero()) {
                return Ok(());
            }
            if Instant::now() > end {
                return Err(format!("no writer is let in: {error}, {state:?}"));
            }
            std::thread::park_timeout(Duration::from_millis(20));
        }
    }

    /// As [`World::wait_until_mended`], while there may still be trouble: then it is not waited for.
    fn wait_for_writers(&mut self) -> Result<(), String> {
        const SHORT: Duration = Duration::from_millis(300);
        let begin = Instant::now();
        loop {
            let Err(error) = self.sql("BEGIN IMMEDIATE; COMMIT") else { return Ok(()) };
            let limit = if self.recorder.is_harmed() { SHORT } else { wait::DEADLINE };
            if begin.elapsed() > limit {
                return Err(error);
            }
            std::thread::park_timeout(Duration::from_millis(5));
        }
    }

    /// What SQLite sees and the engine says is one state.
    pub fn check_in_use(&mut self) -> Result<(), String> {
        let Some(db) = self.db() else { return Ok(()) };
        // Who reads first rolls back what was left half-written.
        if self.sql("SELECT count(*) FROM t").is_err() || db.state() != DbState::Ready {
            return Ok(());
        }
        // Only the wal-index tells which frames of a refused commit do not count.
        if self.mode.is_wal() && self.mode.passthrough {
            return Ok(());
        }
        self.compare(&db).or_else(|error| {
            // A transaction over two databases counts when its super-journal is gone, also where the end of
            // a journal fails, of which SQLite says nothing: whoever ends it next takes it.
            if !self.effects.contains(&Effect::RowInBoth) {
                return Err(error);
            }
            match db.export(&mut std::io::sink()) {
                // Nobody gets anything of it while the disk is full.
                Err(_) => Ok(()),
                Ok(_) if db.state() != DbState::Ready => Ok(()),
                Ok(_) => self.compare(&db),
            }
        })
    }

    /// The files have the checksum of the position.
    fn compare(&self, db: &Db) -> Result<(), String> {
        let dir = DataDir::new(&data(self.root.path())).database(DB);
        let (image, pos, pages) = (Image::of_files(&dir), db.pos(), db.page_count() as usize);
        let Some(image) = image.filter(|image| pages > 0 && image.pages() >= pages) else {
            return Ok(());
        };
        // What could not be cut off belongs to nothing.
        let size = image.bytes().len() / image.pages();
        let sums = image.bytes()[..pages * size].chunks(size).zip(1..);
        let have = sums.fold(ltx::Checksum::EMPTY, |sum, (page, pgno)| {
            sum.toggle(ltx::page_checksum(ltx::Pgno(pgno), page))
        });
        match have == pos.checksum {
            true => Ok(()),
            false => Err(format!("the files have {have}, the position is {pos}")),
        }
    }

    /// Ends everything in order.
    pub fn close(&mut self) -> Result<(), String> {
        self.stop()
    }

    /// Ends the node in order.
    pub fn stop(&mut self) -> Result<(), String> {
        self.connection = None;
        self.events = None;
        let closed = self.engine.close().map_err(|error| engine::chain_text(&error));
        self.client = None;
        closed
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.watching = None;
        self.connection = None;
        self.events = None;
        let _ = self.engine.close();
        self.client = None;
    }
}

/// A database with one row, in a directory of its own.
fn import_file(number: usize) -> tempfile::TempDir {
    let source = ram_dir();
    let sqlite = Connection::open(source.path().join("import")).unwrap();
    sqlite.execute_batch("PRAGMA page_size = 1024; CREATE TABLE filler (x)").unwrap();
    sqlite.execute_batch("CREATE TABLE t (n INTEGER PRIMARY KEY, x)").unwrap();
    sqlite.execute_batch(&row(number, 3000)).unwrap();
    source
}

pub fn row(n: usize, len: usize) -> String {
    format!("INSERT INTO t VALUES ({n}, printf('%0{len}d', {n}))")
}

pub fn key(pos: Pos) -> (u64, u64) {
    (pos.txid.0, pos.checksum.get())
}

/// What the client knew at a moment: what it began, and how that ended.
#[derive(Debug, Clone)]
pub struct Known {
    effects: Vec<(Effect, Option<Ended>)>,
}

impl Known {
    /// After these steps; `effects` began before all steps are done for certain.
    pub fn at(effects: &[Effect], before: usize, steps: &[Step]) -> Known {
        let begun = steps.iter().filter_map(|step| match step {
            Step::Begin(number) => Some(number + 1),
            _ => None,
        });
        let count = begun.max().unwrap_or(before);
        let mut known: Vec<_> = effects[..count].iter().map(|effect| (*effect, None)).collect();
        known[..before].iter_mut().for_each(|(_, ended)| *ended = Some(Ended::Done));
        for step in steps {
            if let Step::End(number, ended) = step {
                known[*number].1 = Some(*ended);
            }
        }
        Known { effects: known }
    }

    /// Whether these rows are what may be there: all that was done, perhaps what was not.
    pub fn allows(&self, rows: &BTreeSet<usize>) -> Result<(), String> {
        self.allows_from(rows, 0, Rows::default())
    }

    fn allows_from(&self, rows: &BTreeSet<usize>, from: usize, known: Rows) -> Result<(), String> {
        let Rows { mut must, mut may, mut lost } = known;
        for (number, (effect, ended)) in self.effects.iter().enumerate().skip(from) {
            let done = *ended == Some(Ended::Done);
            match effect {
                Effect::Same => {}
                Effect::Row if done => _ = must.insert(number),
                Effect::Row => _ = may.insert(number),
                Effect::RowInBoth | Effect::RowInEach => {
                    let of_both = [number, number + OF_TWO];
                    if done {
                        must.extend(of_both)
                    } else {
                        may.extend(of_both)
                    }
                    let [one, two] = of_both.map(|row| rows.contains(&row));
                    if *effect == Effect::RowInBoth && one != two {
                        return Err(format!("row {number} in one of two databases, of {rows:?}"));
                    }
                }
                Effect::Lost => {
                    lost = std::mem::take(&mut must);
                    may.clear();
                }
                Effect::Only | Effect::Nothing | Effect::Back => {
                    let after = match effect {
                        Effect::Only => BTreeSet::from([number]),
                        Effect::Back => lost.clone(),
                        _ => BTreeSet::new(),
                    };
                    if !done {
                        let known = Rows { must: after, may: BTreeSet::new(), lost: lost.clone() };
                        if self.allows_from(rows, number + 1, known).is_ok() {
                            return Ok(());
                        }
                    } else {
                        (must, may) = (after, BTreeSet::new());
                    }
                }
            }
        }
        let lost: Vec<_> = must.difference(rows).collect();
        let odd: Vec<_> =
            rows.iter().filter(|row| !must.contains(row) && !may.contains(row)).collect();
        match (lost.is_empty(), odd.is_empty()) {
            (true, true) => Ok(()),
            _ => Err(format!("lost rows {lost:?}, rows of nobody {odd:?}, in {rows:?}")),
        }
    }

    /// Whether these rows are those after some number of the things that were done, in order.
    pub fn allows_earlier(&self, rows: &BTreeSet<usize>) -> Result<(), String> {
        let is_after = |count: usize| {
            let known = Known { effects: self.effects[..count].to_vec() };
            known.allows(rows).is_ok()
        };
        match (0..=self.effects.len()).any(is_after) {
            true => Ok(()),
            false => Err(format!("rows of no earlier state: {rows:?}")),
        }
    }
}

/// Which rows there are.
#[derive(Default)]
struct Rows {
    must: BTreeSet<usize>,
    may: BTreeSet<usize>,
    /// Those that were lost with the disk.
    lost: BTreeSet<usize>,
}

/// What a node comes to from what a disk holds.
pub struct Restarted {
    pub pos: Pos,
    pub rows: BTreeSet<usize>,
}

/// Starts a node on what stands in `root`, without trouble, and checks that everything is one state:
/// files, chain, checksum, SQLite's own opinion. An error if not, or if the node refuses the database.
pub fn restart(root: &Path) -> Result<Restarted, String> {
    let engine = open(root, 1).map_err(|error| engine::chain_text(&error))?;
    engine.mounted(Arc::new(Pages), true);
    engine.set_role(Role::Primary);
    let result = check(root, &engine);
    let closed = engine.close().map_err(|error| engine::chain_text(&error));
    let restarted = result?;
    closed?;
    // A second start finds the same.
    let again = open(root, 1).map_err(|error| engine::chain_text(&error))?;
    let pos = again.database(DB).map_or(Pos::ZERO, |db| db.pos());
    again.close().map_err(|error| engine::chain_text(&error))?;
    if pos != restarted.pos {
        return Err(format!("at {} first, then at {pos}", restarted.pos));
    }
    Ok(restarted)
}

/// Where the backup is.
const BACKUP: &str = "backup";

fn check(root: &Path, engine: &Arc<Engine>) -> Result<Restarted, String> {
    let mut restarted = check_one(root, engine, DB)?;
    let two = check_one(root, engine, TWO)?;
    restarted.rows.extend(two.rows.iter().map(|row| row + OF_TWO));
    let backup = root.join(BACKUP);
    if backup.is_dir() {
        acts::back_up(engine, &backup).map_err(|error| format!("the backup: {error}"))?;
        restarted.pos = engine.database(DB).map_or(Pos::ZERO, |db| db.pos());
    }
    Ok(restarted)
}

fn check_one(root: &Path, engine: &Engine, name: &str) -> Result<Restarted, String> {
    let Some(db) = engine.database(name) else {
        return Ok(Restarted { pos: Pos::ZERO, rows: BTreeSet::new() });
    };
    if let DbState::Failed(reason) = db.state() {
        return Err(format!("refused: {reason}"));
    }
    let (pos, dir) = (db.pos(), DataDir::new(&data(root)).database(name));
    if pos.is_zero() || db.page_count() == 0 {
        if fs::metadata(dir.database()).is_ok_and(|meta| meta.len() > 0) {
            return Err(format!("pages in the database file at {pos}"));
        }
        return Ok(Restarted { pos, rows: BTreeSet::new() });
    }
    let image = Image::of_files(&dir).ok_or("no database file")?;
    if image.checksum() != pos.checksum {
        return Err(format!("the pages have {}, the position is {pos}", image.checksum()));
    }
    check_chain(&dir, pos, &image)?;
    let rows = read_rows(&dir.database())?;
    Ok(Restarted { pos, rows })
}

/// Every file of the chain verifies, and those after the last gap lead to `pos`; where they begin with
/// the whole database, to these pages. Before a gap stand files whose removal was not durable.
fn check_chain(dir: &DbDir, pos: Pos, image: &Image) -> Result<(), String> {
    let mut database = std::io::Cursor::new(Vec::new());
    let (mut at, mut whole, mut snapshot) = (Pos::ZERO, false, ltx::Txid(0));
    for (min, max, path) in image::chain_files(dir) {
        let open = || std::io::BufReader::new(fs::File::open(&path).unwrap());
        let named = |error: ltx::Error| format!("{}: {error}", path.display());
        let (header, trailer) = ltx::verify(open()).map_err(named)?;
        if (header.min_txid, header.max_txid) != (min, max) {
            return Err(format!("{} is of other transactions", path.display()));
        }
        if max <= snapshot && !header.is_snapshot() {
            continue; // One that a snapshot has replaced; its removal was not durable.
        }
        snapshot = if header.is_snapshot() { max } else { snapshot };
        whole = header.is_snapshot() || (whole && header.pre_pos() == at);
        if header.is_snapshot() {
            database = std::io::Cursor::new(Vec::new());
        } else if header.pre_pos() != at && header.min_txid <= at.txid.next() && !at.is_zero() {
            return Err(format!("{} does not follow on {at}", path.display()));
        }
        if whole {
            ltx::apply(open(), &mut database).map_err(named)?;
        }
        at = Pos { txid: max, checksum: trailer.post_apply };
    }
    if at != pos {
        return Err(format!("the chain ends at {at}, the position is {pos}"));
    }
    match whole && database.get_ref() != image.bytes() {
        true => Err(format!("the chain leads to other pages, {} bytes", database.get_ref().len())),
        false => Ok(()),
    }
}

/// The rows of a database file, if SQLite takes it for a healthy one.
fn read_rows(database: &Path) -> Result<BTreeSet<usize>, String> {
    let copy = ram_dir();
    let path = copy.path().join("db");
    fs::copy(database, &path).unwrap();
    let text = |error: rusqlite::Error| error.to_string();
    let sqlite = Connection::open(&path).map_err(text)?;
    let verdict: String =
        sqlite.query_row("PRAGMA integrity_check", [], |row| row.get(0)).map_err(text)?;
    if verdict != "ok" {
        return Err(format!("integrity_check: {verdict}"));
    }
    let tables: i64 = sqlite
        .query_row("SELECT count(*) FROM sqlite_schema WHERE name = 't'", [], |row| row.get(0))
        .map_err(text)?;
    if tables == 0 {
        return Ok(BTreeSet::new());
    }
    let mut statement = sqlite.prepare("SELECT n, CAST(x AS INTEGER) FROM t").map_err(text)?;
    let rows = statement.query_map([], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?)));
    let rows: Vec<(i64, i64)> = rows.map_err(text)?.collect::<Result<_, _>>().map_err(text)?;
    match rows.iter().find(|(n, x)| n != x) {
        Some(wrong) => Err(format!("row {wrong:?}")),
        None => Ok(rows.into_iter().map(|(n, _)| n as usize).collect()),
    }
}

/// The bytes that a replica at `pos` gets next; none if it has everything.
pub fn next_for(db: &Db, pos: Pos) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    match db.next_after(pos, Overlap::Accepted) {
        Next::Current => return None,
        Next::Ltx { bytes: LtxBytes::Memory(memory), .. } => bytes.extend_from_slice(&memory),
        Next::Ltx { bytes: LtxBytes::File(mut file, _), .. } => {
            std::io::Read::read_to_end(&mut file, &mut bytes).unwrap();
        }
        Next::Snapshot => _ = db.snapshot(&mut bytes).ok()?,
    }
    Some(bytes)
}

/// Hands an LTX file to a replica as it comes off the wire.
pub fn receive(replica: &Engine, bytes: &[u8]) -> engine::Result<Pos> {
    receive_of(replica, DB, bytes)
}

fn receive_of(replica: &Engine, name: &str, bytes: &[u8]) -> engine::Result<Pos> {
    let mut receiver = replica.receive(&DbName::new(name)?)?;
    let path = data(Path::new("wire"));
    receiver.write_all(bytes).map_err(|source| engine::Error::Io {
        what: "receive",
        path,
        source,
    })?;
    receiver.finish()
}

/// Hands a transaction that was made under a HALT lock to the primary.
pub fn receive_forwarded(primary: &Engine, bytes: &[u8], id: HaltId) -> engine::Result<Pos> {
    let mut receiver = primary.receive(&DbName::new(DB)?)?;
    let path = data(Path::new("wire"));
    let write = receiver.write_all(bytes);
    write.map_err(|source| engine::Error::Io { what: "receive", path, source })?;
    receiver.finish_forwarded(id)
}

/// Has a replica follow until it has all that `db` has; then the pages are the same.
pub fn follow_up(db: &Db, db_root: &Path, replica: &Engine, root: &Path) -> Result<(), String> {
    come_after(db, replica)?;
    let of = |root: &Path| Image::of_files(&DataDir::new(&data(root)).database(db.name().as_str()));
    let (ours, theirs) = (of(db_root), of(root));
    match (ours, theirs) {
        (Some(ours), Some(theirs)) if ours == theirs => Ok(()),
        (Some(ours), Some(theirs)) => {
            Err(format!("the replica has other pages: {:?}", ours.differences(&theirs)))
        }
        (ours, theirs) if db.page_count() == 0 || (ours.is_none() && theirs.is_none()) => Ok(()),
        _ => Err("one of them has no database".to_owned()),
    }
}

/// Has a replica follow until it stands where `db` does.
pub fn come_after(db: &Db, replica: &Engine) -> Result<(), String> {
    let (target, name) = (db.pos(), db.name().as_str());
    let mut refused = None;
    let end = Instant::now() + wait::DEADLINE;
    loop {
        let copy = replica.database(name);
        if copy.as_ref().is_some_and(|copy| copy.pos() == target) {
            break;
        }
        let at = copy.as_ref().map_or(Pos::ZERO, |copy| copy.received_pos());
        if at != target
            && let Some(bytes) = next_for(db, at)
            && let Err(error) = receive_of(replica, name, &bytes)
        {
            // As long as what was received before cannot be applied.
            refused = Some(engine::chain_text(&error));
        }
        if Instant::now() > end {
            let at = copy.map(|copy| (copy.pos(), copy.received_pos(), copy.state()));
            return Err(format!("the replica does not come to {target}: {at:?}, {refused:?}"));
        }
        std::thread::park_timeout(Duration::from_millis(2));
    }
    Ok(())
}

/// A new replica that follows a primary on what stands in `root` becomes equal.
pub fn replicate(root: &Path) -> Result<(), String> {
    let engine = open(root, 1).map_err(|error| engine::chain_text(&error))?;
    engine.mounted(Arc::new(Pages), true);
    engine.set_role(Role::Primary);
    let other = ram_dir();
    let replica = replica(other.path(), true).map_err(|error| engine::chain_text(&error))?;
    let databases = engine.databases();
    let mut databases = databases.iter().filter(|db| !db.pos().is_zero());
    let result = databases.try_for_each(|db| follow_up(db, root, &replica, other.path()));
    let _ = replica.close();
    let _ = engine.close();
    result
}

/// A replica on what stands in `root`.
pub fn replica(root: &Path, passthrough: bool) -> engine::Result<Arc<Engine>> {
    let engine = open(root, 2)?;
    engine.mounted(Arc::new(Pages), passthrough);
    follow(&engine);
    Ok(engine)
}
