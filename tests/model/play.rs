//! A script, played on a primary and its replica and in plain SQLite in memory. After each step:
//! the chain applied to nothing, the primary's files, the replica's files and plain SQLite are the
//! same.

use std::cell::Cell;
use std::time::{Duration, Instant};

use ltx::Pos;

use super::client::{Answer, Client, Transaction};
use super::reference::{self, Change, Reference};
use super::script::{Action, CLIENTS, NAMES, Setup, Sql, Step, Victim, View};
use crate::cluster::{Cluster, check_node};
use crate::support::image::{self, Image};
use crate::support::node::{Node, Settings};
use crate::support::{sqlite, wait};

/// Bytes of a database that say whether it has a WAL.
const VERSIONS_AT: usize = 18;

/// How long a lock may be in the way that none of the applications has: one of the node itself.
const PATIENCE: Duration = Duration::from_secs(10);

/// The state of a script.
struct Play {
    setup: Setup,
    cluster: Cluster,
    clients: [Option<Client>; CLIENTS],
    /// What each client opens again when it has something to do and is gone.
    views: [Option<View>; CLIENTS],
    reference: Reference,
    /// Databases whose file may hold what a killed client has left; SQLite's next reader mends it.
    is_dirty: [bool; 2],
    /// What was found at this position, so that it is not looked for again.
    known: [Option<(Pos, String)>; 2],
    /// Numbers for `user_version`, each used once.
    marks: Cell<u32>,
    /// A kill has left a transaction in one of its databases: what comes of later ones is not foreseen.
    is_half: bool,
    tally: Tally,
}

/// What came of the changes of a script.
#[derive(Debug, Default, Clone, Copy)]
pub struct Tally {
    /// Changes that were asked for.
    pub asked: u32,
    /// Those that were made.
    pub made: u32,
    /// Those that an application kept from being made by its locks.
    pub kept_out: u32,
}

impl Tally {
    /// Of two scripts.
    pub fn add(&mut self, other: Tally) {
        self.asked += other.asked;
        self.made += other.made;
        self.kept_out += other.kept_out;
    }
}

/// Plays it; panics at what is wrong.
pub fn play(setup: Setup, steps: &[(usize, &Step)]) -> Tally {
    let mut play = Play::start(setup);
    for &(number, step) in steps {
        let story = format!("step {number}: {step}");
        play.step(step, &story);
        if play.is_half {
            play.cluster.check();
            return play.tally;
        }
        play.check(&story);
    }
    play.end()
}

impl Play {
    fn start(setup: Setup) -> Play {
        let Setup { passthrough, transport, databases } = setup;
        let lines = "strict-verify: true";
        let settings = Settings { passthrough, transport, lines, ..Settings::default() };
        let cluster = Cluster::with(2, &settings);
        let reference = Reference::new();
        for (number, (page_size, auto_vacuum, mode)) in databases.into_iter().enumerate() {
            let sql = format!(
                "pragma page_size={page_size}; pragma auto_vacuum={auto_vacuum}; \
                 pragma journal_mode={mode}; pragma user_version=1"
            );
            sqlite::run(&cluster.file(NAMES[number]), &format!("{sql};"));
            reference.run(&format!("pragma {}.user_version=1", ["main", "b"][number]));
        }
        let known = [None, None];
        let marks = Cell::new(1000);
        let (clients, views) = ([None, None, None], [None; CLIENTS]);
        let (is_dirty, tally) = ([false; 2], Tally::default());
        let is_half = false;
        Play { setup, cluster, clients, views, reference, is_dirty, known, marks, is_half, tally }
    }

    fn primary(&self) -> &Node {
        self.cluster.primary()
    }

    fn step(&mut self, step: &Step, story: &str) {
        let at = step.client;
        let others = self.clients.iter_mut().enumerate().filter(|(other, _)| *other != at);
        for transaction in others.filter_map(|(_, other)| other.as_mut()?.transaction.as_mut()) {
            transaction.is_alone = false;
        }
        match &step.action {
            Action::Open(view) => self.open(at, *view),
            Action::KillClient => self.kill_client(at),
            Action::KillPrimary => self.restart_primary(Node::kill),
            Action::StopPrimary => {
                self.clients = [None, None, None];
                self.restart_primary(|node| _ = node.stop());
            }
            Action::KillReplica if self.cluster.replica().is_running() => {
                self.cluster.nodes[1].kill();
                self.cluster.nodes[1].start();
            }
            Action::KillBoth => {
                let was_running = self.cluster.replica().is_running();
                self.cluster.nodes[1].kill();
                self.restart_primary(Node::kill);
                if was_running {
                    self.cluster.nodes[1].start();
                }
            }
            Action::ToggleReplica => match self.cluster.replica().is_running() {
                true => _ = self.cluster.nodes[1].stop(),
                false => self.cluster.nodes[1].start(),
            },
            Action::KillReplica => {}
            Action::KillDuring(victim, delay, sql) => {
                self.kill_during(at, *victim, *delay, sql, story)
            }
            Action::KillDuringCommit(victim, delay) => {
                self.kill_during_commit(at, *victim, *delay, story);
            }
            Action::CopyOutAndIn(database) => self.copy_out_and_in(*database),
            Action::Remove(database) => self.remove(*database),
            Action::Look => self.look(),
            _ => self.tell(at, &step.action, story),
        }
    }

    /// What a client does in SQL.
    fn tell(&mut self, at: usize, action: &Action, story: &str) {
        if let (None, Some(view)) = (&self.clients[at], self.views[at]) {
            self.open(at, view);
        }
        let Some(mut client) = self.clients[at].take() else { return };
        match action {
            Action::Begin(opener) if client.transaction.is_none() => {
                match self.ask(&mut client, opener, story) {
                    Answer::Done(_) => client.transaction = Some(Transaction::of(opener)),
                    Answer::Busy => {}
                    answer => panic!("{story}: {answer:?}"),
                }
            }
            Action::Change(sql) if self.may_change(&client, sql) => {
                let text = reference::named(sql, client.schemas());
                let answer = self.ask(&mut client, &text, story);
                self.changed(&mut client, sql, answer, story);
            }
            Action::Read(database, table) if client.view.has(*database) => {
                let sql = reference::sums(client.schemas()[*database], *table);
                let answer = self.ask(&mut client, &sql, story);
                self.read(&mut client, *database, *table, answer, story);
            }
            Action::Outside(sql) if client.transaction.is_none() => {
                self.aside(&mut client, sql, story);
            }
            Action::Anywhere(sql) => self.aside(&mut client, sql, story),
            Action::Savepoint(sql) if client.transaction.is_some() => {
                let answer = self.ask(&mut client, sql, story);
                let transaction = client.transaction.as_mut().expect("was looked at");
                let change = Change::Savepoint(sql.clone());
                let takes = self.reference.takes(&transaction.changes, &change);
                match answer {
                    Answer::Done(_) if takes => transaction.changes.push(change),
                    Answer::Refused(_) if !takes => {}
                    answer => panic!("{story}: {answer:?}; plain SQLite takes it: {takes}"),
                }
            }
            Action::Commit => self.commit(&mut client, story),
            Action::Rollback if client.transaction.take().is_some() => {
                let answer = client.ask("rollback");
                assert!(matches!(answer, Answer::Done(_)), "{story}: {answer:?}");
            }
            _ => {}
        }
        self.clients[at] = Some(client);
    }

    fn open(&mut self, at: usize, view: View) {
        self.views[at] = Some(view);
        if let Some(client) = self.clients[at].take() {
            client.close();
        }
        let mut client = Client::open(self.primary(), view);
        for database in (0..2).filter(|&database| view.has(database)) {
            let schema = client.schemas()[database];
            let mode = self.setup.databases[database].2;
            let now = client.ask(&format!("pragma {schema}.journal_mode"));
            if now == Answer::Done("delete".to_owned()) && mode != "wal" {
                client.ask(&format!("pragma {schema}.journal_mode={mode}"));
            }
        }
        self.clients[at] = Some(client);
    }

    /// Asks; again and again, if a lock is in the way that none of the applications can have.
    fn ask(&self, client: &mut Client, sql: &str, story: &str) -> Answer {
        let end = Instant::now() + PATIENCE;
        loop {
            let answer = match client.ask(sql) {
                // Its way to say that it found a lock.
                Answer::Done(row) if sql.contains("checkpoint(") && row.starts_with("1|") => {
                    Answer::Busy
                }
                answer => answer,
            };
            if answer != Answer::Busy || self.may_be_busy(client, sql) {
                return answer;
            }
            assert!(Instant::now() < end, "{story}: refused for {PATIENCE:?}, nobody has a lock");
        }
    }

    /// Whether another application, or a snapshot of its own that is old, may be in the way of one.
    fn may_be_busy(&self, client: &Client, sql: &str) -> bool {
        // Who has a WAL open keeps a lock for as long.
        let is_switch = sql.contains("journal_mode=");
        let meets = |other: &Client| (0..2).any(|n| client.view.has(n) && other.view.has(n));
        let mut others = self.clients.iter().flatten();
        let is_old = |own: &Transaction| (0..2).any(|database| own.may_be_old(database));
        others.any(|other| meets(other) && (is_switch || other.transaction.is_some()))
            || client.transaction.as_ref().is_some_and(is_old)
    }

    /// A statement that changes no row.
    fn aside(&mut self, client: &mut Client, sql: &str, story: &str) {
        let named = |n: usize| sql.contains(&format!("@{n}"));
        if (0..2).any(|n| named(n) && !client.view.has(n)) {
            return;
        }
        let schemas = client.schemas();
        let text = sql.replace("@0", schemas[0]).replace("@1", schemas[1]);
        match self.ask(client, &text, story) {
            Answer::Done(row) => {
                let mode = sql.split_once("journal_mode=").map(|(_, mode)| mode);
                let wanted = if sql.ends_with("quick_check") { Some("ok") } else { mode };
                assert!(wanted.is_none_or(|wanted| row == wanted), "{story}: {row}");
            }
            Answer::Busy => {}
            Answer::Refused(_) if (0..2).any(|n| named(n) && self.is_held(n)) => {}
            // SQLite looks for the object in the schema that the connection has, and not whether that is an old one.
            Answer::Refused(complaint) if complaint.contains("object to be reindexed") => {}
            Answer::Refused(complaint) => {
                assert!(!self.reference.takes_aside(sql), "{story}: {complaint}");
            }
            Answer::Gone => panic!("{story}: sqlite3 has ended"),
        }
    }

    fn commit(&mut self, client: &mut Client, story: &str) {
        let Some(commit) = client.transaction.as_ref().map(|own| own.commit) else { return };
        match self.ask(client, commit, story) {
            Answer::Done(_) => {
                let transaction = client.transaction.take().expect("was looked at");
                self.reference.commit(&transaction.changes);
            }
            Answer::Busy => {}
            answer => panic!("{story}: {answer:?}"),
        }
    }

    fn changed(&mut self, client: &mut Client, sql: &Sql, answer: Answer, story: &str) {
        self.tally.asked += 1;
        self.tally.made += u32::from(matches!(answer, Answer::Done(_)));
        self.tally.kept_out += u32::from(answer == Answer::Busy);
        let may_remember = self.may_remember(client);
        match (&mut client.transaction, answer) {
            (_, Answer::Busy) => {}
            (_, Answer::Gone) => panic!("{story}: sqlite3 has ended"),
            (Some(transaction), Answer::Done(_)) => {
                let change = Change::Sql(sql.clone());
                let takes = self.reference.takes(&transaction.changes, &change);
                assert!(takes, "{story}: plain SQLite refuses it");
                transaction.changes.push(change);
            }
            (Some(transaction), Answer::Refused(_)) if transaction.may_be_old(sql.database) => {}
            (Some(_), Answer::Refused(_)) if may_remember => {}
            (Some(transaction), Answer::Refused(complaint)) => {
                let change = Change::Sql(sql.clone());
                let takes = self.reference.takes(&transaction.changes, &change);
                assert!(!takes, "{story}: {complaint}");
            }
            (None, Answer::Done(_)) => {
                assert!(self.reference.apply(sql), "{story}: plain SQLite refuses it");
            }
            (None, Answer::Refused(_)) if may_remember => {}
            (None, Answer::Refused(complaint)) => {
                assert!(!self.reference.apply(sql), "{story}: {complaint}");
            }
        }
    }

    fn read(&self, client: &mut Client, database: usize, table: u64, answer: Answer, story: &str) {
        let found = match answer {
            Answer::Done(text) => Some(text),
            Answer::Refused(_) if self.may_remember(client) => return,
            Answer::Refused(_) => None,
            Answer::Busy => return,
            Answer::Gone => panic!("{story}: sqlite3 has ended"),
        };
        let sums = |reference: &Reference, table| reference.sums(database, table);
        let wanted = match &mut client.transaction {
            None => sums(&self.reference, table),
            Some(transaction) if transaction.holds(database) => {
                self.reference.with(&transaction.changes, |reference| sums(reference, table))
            }
            Some(transaction) => {
                let seen = &mut transaction.seen[database];
                if seen.is_none() && found.is_some() {
                    *seen = Some((1..=3).map(|table| sums(&self.reference, table)).collect());
                }
                match seen {
                    Some(seen) => seen[table as usize - 1].clone(),
                    None => sums(&self.reference, table),
                }
            }
        };
        assert_eq!(found, wanted, "{story}");
    }

    /// Kills a client; what it had begun is gone.
    fn kill_client(&mut self, at: usize) {
        let Some(mut client) = self.clients[at].take() else { return };
        self.leaves(&mut client);
        client.kill();
    }

    /// Notes what a client that is killed may leave.
    fn leaves(&mut self, client: &mut Client) {
        if let Some(transaction) = client.transaction.take() {
            for database in 0..2 {
                self.is_dirty[database] |= client.view.has(database) && transaction.holds(database);
            }
        }
    }

    fn restart_primary(&mut self, end: impl Fn(&mut Node)) {
        end(&mut self.cluster.nodes[0]);
        for at in 0..CLIENTS {
            self.kill_client(at);
        }
        self.cluster.nodes[0].start();
        // What was left is rolled back by who recovers.
        self.is_dirty = [false; 2];
    }

    /// A change of its own, in which somebody is killed.
    fn kill_during(&mut self, at: usize, victim: Victim, delay: u64, sql: &Sql, story: &str) {
        let Some(client) = self.clients[at].take() else { return };
        if client.transaction.is_some() || !self.may_change(&client, sql) {
            self.clients[at] = Some(client);
            return;
        }
        let text = reference::named(sql, client.schemas());
        self.kill_in(at, client, (victim, delay), &text, &[Change::Sql(sql.clone())], story);
    }

    /// A commit, in which somebody is killed.
    fn kill_during_commit(&mut self, at: usize, victim: Victim, delay: u64, story: &str) {
        let Some(mut client) = self.clients[at].take() else { return };
        let Some(transaction) = client.transaction.take() else {
            self.clients[at] = Some(client);
            return;
        };
        let Transaction { commit, changes, .. } = transaction;
        self.kill_in(at, client, (victim, delay), commit, &changes, story);
    }

    fn kill_in(
        &mut self,
        at: usize,
        mut client: Client,
        (victim, delay): (Victim, u64),
        sql: &str,
        changes: &[Change],
        story: &str,
    ) {
        self.settle_others();
        let was_wal = self.has_wal();
        client.tell(sql);
        let end = Instant::now() + Duration::from_micros(delay);
        while Instant::now() < end {
            std::thread::park_timeout(Duration::from_micros(50));
        }
        let answer = match victim {
            Victim::Client => client.kill(),
            Victim::Primary => {
                self.cluster.nodes[0].kill();
                let answer = client.kill_without_node();
                self.restart_primary(|_| ());
                answer
            }
            Victim::Replica => {
                self.cluster.nodes[1].kill();
                let answer = client.answer();
                self.cluster.nodes[1].start();
                if answer != Answer::Gone {
                    // An end of the transaction, whatever came of it.
                    client.ask("rollback");
                    self.clients[at] = Some(client);
                }
                answer
            }
        };
        let mark = Change::Sql(self.mark(0));
        let marks = [mark, Change::Sql(self.mark(1))];
        for (database, name) in NAMES.iter().enumerate() {
            let Change::Sql(mark) = &marks[database] else { continue };
            let text = reference::named(mark, ["main", "main"]);
            sqlite::run(&self.cluster.file(name), &format!("{text};"));
        }
        self.is_dirty = [false; 2];
        let with = |changes: &[Change]| {
            let changes: Vec<Change> = changes.iter().chain(&marks).cloned().collect();
            self.reference.with(&changes, |reference| [0, 1].map(|n| reference.dump(n)))
        };
        let (before, after) = (with(&[]), with(changes));
        let found = [0, 1].map(|database| self.dump(database, story));
        let is = |wanted: &[String; 2]| found == *wanted;
        let may_be_before = !matches!(answer, Answer::Done(_));
        let may_be_after = !matches!(answer, Answer::Busy | Answer::Refused(_));
        if is(&after) && may_be_after {
            self.reference.commit(changes);
        } else if !(is(&before) && may_be_before) {
            let half = (0..2).all(|n| found[n] == before[n] || found[n] == after[n]);
            // Databases are bound together by a super-journal, and a WAL needs none (sqlite.org/atomiccommit.html).
            if half && answer == Answer::Gone && was_wal.contains(&true) {
                self.is_half = true;
                return;
            }
            let words = (0..2)
                .map(|n| reference::difference(&found[n], &after[n]))
                .collect::<Vec<_>>()
                .join("; ");
            panic!("{story}: {answer:?}; half: {half}, wal: {was_wal:?}; {words}");
        }
        self.reference.commit(&marks);
    }

    /// A change that nothing else makes.
    fn mark(&self, database: usize) -> Sql {
        self.marks.set(self.marks.get() + 1);
        let text = format!("pragma @.user_version={}", self.marks.get());
        Sql { database, reads_other: false, text }
    }

    /// Nobody is in a transaction.
    fn settle_others(&mut self) {
        for client in self.clients.iter_mut().flatten() {
            if client.transaction.take().is_some() {
                client.ask("rollback");
            }
        }
    }

    /// Which databases have a WAL.
    fn has_wal(&self) -> [bool; 2] {
        [0, 1].map(|database| {
            let image = Image::of_files(&self.primary().db_dir(NAMES[database]));
            image.is_some_and(|image| image.bytes()[VERSIONS_AT] == 2)
        })
    }

    /// Out by `export`, and in by `import`.
    fn copy_out_and_in(&mut self, database: usize) {
        self.settle_others();
        let (node, name) = (self.primary(), NAMES[database]);
        let path = node.scratch("exported.db");
        let path = path.to_str().unwrap();
        if node.pos(name).is_zero() || Image::of_files(&node.db_dir(name)).is_none() {
            return;
        }
        for command in ["export", "import"] {
            let output = node.litefs(command, &["-name", name, path]);
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success(), "{command}: {said}");
        }
    }

    fn remove(&mut self, database: usize) {
        for client in self.clients.iter_mut() {
            if let Some(client) = client.take_if(|client| client.view.has(database)) {
                client.close();
            }
        }
        let path = self.cluster.file(NAMES[database]);
        if path.exists() {
            std::fs::remove_file(path).unwrap();
        }
        self.reference.clear(database);
        self.is_dirty[database] = false;
    }

    /// What SQLite sees in both mounts.
    fn look(&mut self) {
        let transactions =
            self.clients.iter().flatten().filter_map(|client| client.transaction.as_ref());
        if transactions.clone().any(|transaction| transaction.holds(0) || transaction.holds(1)) {
            return;
        }
        for (database, name) in NAMES.iter().enumerate() {
            if self.primary().pos(name).is_zero() || !self.cluster.file(name).exists() {
                continue;
            }
            // SQLite rolls back what a killed client has left.
            sqlite::run(&self.cluster.file(name), "select count(*) from sqlite_schema;");
            self.is_dirty[database] = false;
            let pos = self.primary().pos(name);
            check_node(self.primary(), name, pos);
            if self.cluster.replica().is_running() {
                self.cluster.replica().wait_for_pos(name, pos);
                check_node(self.cluster.replica(), name, pos);
            }
        }
    }

    /// Whether the file of a database may hold what is not committed.
    fn is_open(&self, database: usize) -> bool {
        let holds = |client: &Client| {
            let holds = |transaction: &Transaction| transaction.holds(database);
            client.view.has(database) && client.transaction.as_ref().is_some_and(holds)
        };
        self.is_dirty[database] || self.clients.iter().flatten().any(holds)
    }

    /// The chain, both nodes' files and plain SQLite are the same.
    fn check(&mut self, story: &str) {
        for (database, name) in NAMES.iter().enumerate() {
            let found = self.dump(database, story);
            let wanted = self.reference.dump(database);
            if found != wanted {
                panic!("{story}: {name}: {}", reference::difference(&found, &wanted));
            }
        }
    }

    /// What a database holds, by its chain; the files of both nodes hold the same.
    fn dump(&mut self, database: usize, story: &str) -> String {
        let name = NAMES[database];
        let pos = self.primary().pos(name);
        if pos.is_zero() {
            return Reference::new().dump(database);
        }
        let replica = Some(self.cluster.replica()).filter(|replica| replica.is_running());
        let dir = self.primary().db_dir(name);
        let chain = image::replay_chain(&dir, pos);
        let is_chain = |image: &Option<Image>| *image == chain;
        if !self.is_open(database) {
            let files = Image::of_files(&dir);
            assert!(is_chain(&files), "{story}: {name}: the chain leads elsewhere than the files");
        }
        if let Some(replica) = replica {
            replica.wait_for_pos(name, pos);
            wait::until_or(
                || format!("{story}: {name}: the replica's files at {pos}"),
                || is_chain(&Image::of_files(&replica.db_dir(name))).then_some(()),
            );
        }
        if let Some((known, text)) = &self.known[database]
            && *known == pos
        {
            return text.clone();
        }
        let text = match chain {
            None => Reference::new().dump(database),
            Some(image) => {
                let path = self.primary().scratch("replayed.db");
                let mut bytes = image.bytes().to_vec();
                bytes[VERSIONS_AT..VERSIONS_AT + 2].fill(1);
                std::fs::write(&path, bytes).unwrap();
                reference::dump_file(&path)
            }
        };
        self.known[database] = Some((pos, text.clone()));
        text
    }

    fn end(mut self) -> Tally {
        self.settle_others();
        for client in self.clients.iter_mut() {
            if let Some(client) = client.take() {
                client.close();
            }
        }
        if !self.cluster.replica().is_running() {
            self.cluster.nodes[1].start();
        }
        self.check("the end");
        self.look();
        self.check("after a look");
        self.cluster.check();
        for node in &self.cluster.nodes {
            for name in NAMES {
                let aside = node.db_dir(name).lost_found();
                assert!(!aside.exists(), "{} holds something", aside.display());
            }
        }
        self.tally
    }

    /// Whether what comes of a change can be foreseen.
    fn may_change(&self, client: &Client, sql: &Sql) -> bool {
        let has = client.view.has(sql.database) && (!sql.reads_other || client.view == View::Both);
        // A snapshot may be old, and so may be what SQLite remembers of the tables while others hold the
        // database; what changes nothing there locks nothing.
        let is_old = match &client.transaction {
            Some(transaction) => !transaction.is_immediate,
            None => self.may_remember(client),
        };
        has && !(is_old && (sql.reads_other || sql.text.contains(" exists ")))
    }

    /// Whether SQLite may go by the tables that it remembers: to see whether it should look again it begins to read
    /// each of its databases in turn, and gives up at the first that somebody holds (prepare.c, `schemaIsValid`).
    fn may_remember(&self, client: &Client) -> bool {
        (0..2).any(|n| client.view.has(n) && self.is_held(n))
    }

    /// Whether any of the other clients has a database in a transaction; one that acts is taken out.
    fn is_held(&self, database: usize) -> bool {
        let others = self.clients.iter().flatten();
        others.into_iter().any(|other| other.view.has(database) && other.transaction.is_some())
    }
}
