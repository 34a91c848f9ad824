//! A script: how the databases begin, and what clients, nodes and chance do to them, step by step. All
//! of it comes from one seed. A step that makes no sense when it is reached does nothing, so any steps
//! may be left out.

use std::fmt;

use crate::support::chance::Chance;

/// The databases; both have tables `t1` to `t3`.
pub const NAMES: [&str; 2] = ["a.db", "b.db"];
/// Applications at a time.
pub const CLIENTS: usize = 3;
const TABLES: u64 = 3;
const MODES: [&str; 4] = ["delete", "truncate", "persist", "wal"];

/// How a script begins.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    /// `fuse.passthrough`.
    pub passthrough: &'static str,
    /// `fuse.transport`.
    pub transport: &'static str,
    /// Page size, auto_vacuum and journal mode of each database.
    pub databases: [(u32, &'static str, &'static str); 2],
}

/// One change of what a database holds. `@` stands for the schema of the database.
#[derive(Debug, Clone)]
pub struct Sql {
    /// The database that changes.
    pub database: usize,
    /// Whether it also reads from the other one, which then is `@@`.
    pub reads_other: bool,
    /// The statement.
    pub text: String,
}

/// Which databases a client has open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum View {
    /// One of them.
    One(usize),
    /// The first one, with the second attached.
    Both,
}

impl View {
    /// Whether it has this database.
    pub fn has(self, database: usize) -> bool {
        self == View::Both || self == View::One(database)
    }
}

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Victim {
    /// The client itself.
    Client,
    /// The primary.
    Primary,
    /// The replica.
    Replica,
}

/// What is done.
#[derive(Debug, Clone)]
pub enum Action {
    /// A new process opens databases.
    Open(View),
    /// `begin` in one of its ways, or the savepoint `s0`, which nothing else names.
    Begin(&'static str),
    /// A change, in a transaction or as one.
    Change(Sql),
    /// A row with the sums of a table.
    Read(usize, u64),
    /// A statement that changes no row, perhaps a file: a pragma, a vacuum. Not within a transaction.
    Outside(String),
    /// Such a statement, also within a transaction.
    Anywhere(String),
    /// A savepoint, within a transaction.
    Savepoint(String),
    /// The end of a transaction.
    Commit,
    /// The other end of a transaction.
    Rollback,
    /// Killed where it stands.
    KillClient,
    /// A statement in the middle of which somebody is killed after some microseconds.
    KillDuring(Victim, u64, Sql),
    /// A commit in the middle of which somebody is killed after some microseconds.
    KillDuringCommit(Victim, u64),
    /// The primary is killed and started again.
    KillPrimary,
    /// The primary is stopped and started again.
    StopPrimary,
    /// The replica is killed and started again.
    KillReplica,
    /// Both nodes are killed at once.
    KillBoth,
    /// The replica is away until the next such step.
    ToggleReplica,
    /// A database is exported, and imported again.
    CopyOutAndIn(usize),
    /// A database is removed.
    Remove(usize),
    /// Everything is looked at through the mounts.
    Look,
}

/// An action, and the client that does it.
#[derive(Debug, Clone)]
pub struct Step {
    /// The client, for what clients do.
    pub client: usize,
    /// What happens.
    pub action: Action,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "client {}: ", self.client)?;
        match &self.action {
            Action::Change(sql) => write!(f, "{}: {}", NAMES[sql.database], sql.text),
            Action::Outside(sql) | Action::Anywhere(sql) | Action::Savepoint(sql) => {
                f.write_str(sql)
            }
            action => write!(f, "{action:?}"),
        }
    }
}

/// The way a script begins.
pub fn setup(chance: &mut Chance) -> Setup {
    let mut database = || {
        let page_size = chance.of(&[512, 1024, 2048, 4096, 4096, 8192, 32768, 65536]);
        let auto_vacuum = chance.of(&["none", "none", "full", "incremental"]);
        (page_size, auto_vacuum, chance.of(&["delete", "truncate", "persist", "wal", "wal", "wal"]))
    };
    let databases = [database(), database()];
    let (passthrough, transport) = chance.of(&[
        ("auto", "auto"),
        ("auto", "auto"),
        ("auto", "dev"),
        ("off", "auto"),
        ("off", "dev"),
    ]);
    Setup { passthrough, transport, databases }
}

/// So many steps.
pub fn steps(chance: &mut Chance, count: usize) -> Vec<Step> {
    let mut steps: Vec<Step> =
        (0..CLIENTS).map(|client| Step { client, action: Action::Open(view(chance)) }).collect();
    for database in 0..2 {
        for table in 1..=TABLES {
            let kind = chance.of(&["", "", " without rowid"]);
            let unique = chance.of(&["", "", " unique"]);
            let text = format!(
                "create table if not exists @.t{table}(k integer primary key, v text{unique}, w){kind}"
            );
            let action = Action::Change(Sql { database, reads_other: false, text });
            steps.push(Step { client: chance.below(CLIENTS as u64) as usize, action });
        }
    }
    steps.extend(
        (0..count).map(|_| Step {
            client: chance.below(CLIENTS as u64) as usize,
            action: action(chance),
        }),
    );
    steps
}

fn view(chance: &mut Chance) -> View {
    chance.of(&[View::Both, View::Both, View::One(0), View::One(1)])
}

fn victim(chance: &mut Chance) -> Victim {
    chance.of(&[Victim::Client, Victim::Client, Victim::Primary, Victim::Primary, Victim::Replica])
}

fn action(chance: &mut Chance) -> Action {
    let delay = |chance: &mut Chance| {
        let limit = chance.of(&[200, 1000, 5000]);
        chance.below(limit)
    };
    match chance.below(200) {
        0..20 => Action::Begin(chance.of(&[
            "begin deferred",
            "begin immediate",
            "begin immediate",
            "begin exclusive",
            "savepoint s0",
        ])),
        20..88 => Action::Change(change(chance)),
        88..100 => Action::Read(chance.below(2) as usize, 1 + chance.below(TABLES)),
        100..124 => Action::Commit,
        124..129 => Action::Rollback,
        129..138 => {
            let name = chance.of(&["s1", "s2", "s3"]);
            let verb =
                chance.of(&["savepoint", "savepoint", "release", "rollback to", "rollback to"]);
            Action::Savepoint(format!("{verb} {name}"))
        }
        138..147 => Action::Outside(journal_mode(chance)),
        147..155 => Action::Outside(vacuum(chance)),
        155..158 => {
            let schema = schema(chance);
            Action::Anywhere(format!("pragma {schema}.incremental_vacuum({})", chance.below(9)))
        }
        158..163 => {
            let (schema, kind) =
                (schema(chance), chance.of(&["passive", "full", "restart", "truncate"]));
            Action::Outside(format!("pragma {schema}.wal_checkpoint({kind})"))
        }
        163..170 => Action::Outside(tune(chance)),
        170..175 => Action::Open(view(chance)),
        175..180 => Action::KillClient,
        180..184 => {
            let (victim, delay) = (victim(chance), delay(chance));
            Action::KillDuring(victim, delay, change(chance))
        }
        184..188 => Action::KillDuringCommit(victim(chance), delay(chance)),
        188..190 => Action::KillPrimary,
        190 => Action::StopPrimary,
        191..193 => Action::KillReplica,
        193 => Action::KillBoth,
        194..196 => Action::ToggleReplica,
        196 => Action::CopyOutAndIn(chance.below(2) as usize),
        197 => Action::Remove(chance.below(2) as usize),
        _ => Action::Look,
    }
}

/// `@0` and `@1` stand for the databases.
fn schema(chance: &mut Chance) -> &'static str {
    chance.of(&["@0", "@1"])
}

fn journal_mode(chance: &mut Chance) -> String {
    format!("pragma {}.journal_mode={}", schema(chance), chance.of(&MODES))
}

fn vacuum(chance: &mut Chance) -> String {
    let schema = schema(chance);
    match chance.below(4) {
        0 => {
            let size = chance.of(&[512, 1024, 2048, 4096, 16384, 32768, 65536]);
            format!("pragma {schema}.page_size={size}; vacuum {schema}")
        }
        1 => {
            let kind = chance.of(&["none", "full", "incremental"]);
            format!("pragma {schema}.auto_vacuum={kind}; vacuum {schema}")
        }
        _ => format!("vacuum {schema}"),
    }
}

fn tune(chance: &mut Chance) -> String {
    let schema = schema(chance);
    match chance.below(9) {
        0 => format!("pragma {schema}.cache_size={}", chance.of(&[1, 5, 100])),
        1 => format!(
            "pragma {schema}.synchronous={}",
            chance.of(&["off", "normal", "full", "extra"])
        ),
        2 => format!("pragma wal_autocheckpoint={}", chance.of(&[0, 3, 20, 1000])),
        3 => format!("pragma {schema}.journal_size_limit={}", chance.of(&[-1, 0, 3000])),
        4 => format!("pragma {schema}.secure_delete={}", chance.of(&["on", "off", "fast"])),
        5 => format!("pragma {schema}.mmap_size={}", chance.of(&[0, 1 << 20])),
        6 => format!("pragma cache_spill={}", chance.of(&["1", "0", "20"])),
        7 => format!("reindex {schema}.i{}", 1 + chance.below(TABLES)),
        _ => format!("pragma {schema}.quick_check"),
    }
}

/// A change that does the same to any database with the same rows.
fn change(chance: &mut Chance) -> Sql {
    let database = chance.below(2) as usize;
    let table = 1 + chance.below(TABLES);
    let (count, stride) = (chance.of(&[1, 3, 20, 200]), 1 + chance.below(97));
    let (offset, len) = (chance.below(500), chance.of(&[1, 10, 100, 700, 3000]));
    let (m, r) = (1 + chance.below(7), chance.below(7));
    let verb = chance.of(&[
        "insert or replace",
        "insert or replace",
        "insert or ignore",
        "insert",
        "replace",
    ]);
    let rows = format!(
        "with recursive n(i) as (select 1 union all select i + 1 from n where i < {count}) \
         select (i * {stride} + {offset}) % 997, printf('%0{len}d', i * {stride} + {offset}), null from n"
    );
    let mut reads_other = false;
    let text = match chance.below(24) {
        0..9 => format!("{verb} into @.t{table} {rows}"),
        9 => {
            let size = chance.of(&[2000, 30_000, 200_000]);
            format!(
                "insert or replace into @.t{table}(k, v, w) \
                 values ({offset}, 'large {stride}', replace(hex(zeroblob({size})), '00', 'b{stride}'))"
            )
        }
        10..13 => format!("delete from @.t{table} where k % {m} = {r}"),
        13..16 => format!(
            "update @.t{table} set w = substr(coalesce(w, '') || '{offset} ' || v, -{len}) \
             where k % {m} = {r}"
        ),
        16 => format!("create index if not exists @.i{table} on t{table}(w)"),
        17 => format!("drop index if exists @.i{table}"),
        18 => format!("drop table if exists @.t{table}"),
        19 => format!("create table if not exists @.t{table}(k integer primary key, v text, w)"),
        20 => format!("alter table @.t{table} add column c{m}"),
        21 => format!("pragma @.user_version={offset}"),
        22 => format!("delete from @.t{table}"),
        _ => {
            reads_other = true;
            format!(
                "insert or replace into @.t{table}(k, v, w) \
                 select k, v, w from @@.t{table} where k % {m} = {r}"
            )
        }
    };
    Sql { database, reads_other, text }
}
