//! The power is lost at any moment, and the disk has any part of what was not synced.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use litefs::engine::Engine;
use litefs::os::fault::{self, Fault};

use super::disk::{Content, Disk, Loss, Names, Recorder, Step};
use super::faults::{Calm, Feed, Finds, Script, base, calms, report, started};
use super::script::{Act, DB, Known, Mode, World, data, receive, replica, replicate, restart};
use super::{each, is_whole, ram_dir, seed};
use crate::support::chance::Chance;
use crate::support::{image, wait};

/// What SQLite promises for a commit that it reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Promise {
    /// It is there.
    Kept,
    /// It, or an earlier state, is.
    Earlier,
}

impl Mode {
    /// What it is worth.
    pub fn promise(self) -> Promise {
        match self.synchronous {
            "full" | "extra" => Promise::Kept,
            "normal" if !self.is_wal() => Promise::Kept,
            _ => Promise::Earlier,
        }
    }
}

/// A moment and how much is lost then.
struct Case<'a> {
    calm: &'a Calm,
    end: usize,
    loss: Loss,
    seed: u64,
    replicates: bool,
}

impl Case<'_> {
    fn run(&self) -> Result<(), String> {
        let Calm { script, base, steps, .. } = self.calm;
        let what = |error: String| {
            if std::env::var_os("LITEFS_TEST_DUMP").is_some() {
                dump(&steps[..self.end]);
            }
            let mut last = format!("{:?}", steps[..self.end].last());
            last.truncate(120);
            format!(
                "{} after step {} ({last}) {:?} {}: {error}",
                script.name, self.end, self.loss, self.seed
            )
        };
        let lost = ram_dir();
        let mut chance = Chance(self.seed);
        Disk::after_power_loss(&self.calm.start, steps, self.end, self.loss, &mut chance)
            .store(lost.path());
        let known = Known::at(&self.calm.effects, base.effects.len(), &steps[..self.end]);
        let restarted = restart(lost.path()).map_err(what)?;
        match script.mode.promise() {
            Promise::Kept => known.allows(&restarted.rows).map_err(what)?,
            Promise::Earlier => known.allows_earlier(&restarted.rows).map_err(what)?,
        }
        if !self.calm.may_have_been_at(restarted.pos) {
            return Err(what(format!("at {}, where it never was", restarted.pos)));
        }
        if self.replicates {
            replicate(lost.path()).map_err(what)?;
        }
        Ok(())
    }
}

/// Says what happened.
pub fn dump(steps: &[Step]) {
    for (at, step) in steps.iter().enumerate() {
        let mut text = format!("{step:?}");
        text.truncate(100);
        println!("{at} {text}");
    }
}

/// Those whose switches of the journal mode leave one promise.
fn is_lossy(calm: &Calm) -> bool {
    calm.script.mode.synchronous != "off"
}

#[test]
fn the_power_may_be_lost_at_any_moment() {
    let mut chance = Chance(seed());
    let calms: Vec<&Calm> = calms().iter().filter(|calm| is_lossy(calm)).collect();
    let moments: usize = calms.iter().map(|calm| calm.steps.len() + 1).sum();
    let (stride, images) = if is_whole() { (1, IMAGES) } else { ((moments / 300).max(1), 1) };
    let mut cases = Vec::new();
    for calm in calms.iter().copied() {
        let first = chance.below(stride as u64) as usize;
        for end in (first..=calm.steps.len()).step_by(stride) {
            for _ in 0..images {
                let (loss, seed) = (Loss::nth(cases.len()), chance.next());
                let replicates = cases.len() % 16 == 0;
                cases.push(Case { calm, end, loss, seed, replicates });
            }
        }
    }
    let failures = each(&cases, Case::run);
    println!("{moments} moments of {} scripts, {} images", calms.len(), cases.len());
    report("a power loss", &failures);
}

/// Images of each moment, when all moments are tried.
const IMAGES: usize = 5;

fn lost() -> Loss {
    Loss { content: Content::Lost, names: Names::Lost }
}

/// What is left of what a world did, if everything is lost that can be.
fn least(world: &World, end: usize) -> Disk {
    let steps = world.recorder.steps();
    Disk::after_power_loss(&world.recorder.base, &steps, end, lost(), &mut Chance(1))
}

/// The name of the data directory itself, and those in it.
#[test]
fn the_first_commit_survives_with_the_directories_that_it_needs() {
    for mode in [Mode::new("wal", "full", true), Mode::new("delete", "full", true)] {
        let mut world = started(World::start(mode, &Disk::default(), Vec::new(), None));
        world.act(Act::Begin).unwrap();
        world.act(Act::Insert).unwrap();
        let left = ram_dir();
        least(&world, world.recorder.steps().len()).store(left.path());
        assert_eq!(restart(left.path()).unwrap().rows, BTreeSet::from([1]), "{mode:?}");
    }
}

/// A journal that names a super-journal which is not there is one of a transaction that has committed.
#[test]
fn a_super_journal_has_a_durable_name_before_it_counts() {
    let mode = Mode::new("delete", "full", true);
    let mut world = started(World::start(mode, &Disk::default(), Vec::new(), None));
    for act in [Act::Begin, Act::Both, Act::Both] {
        world.act(act).unwrap();
    }
    let (steps, effects) = (world.recorder.steps(), world.effects.clone());
    let is_its = |name: &Path| name.starts_with("data/super-journals/");
    let made = |step: &Step| matches!(step, Step::Make(_, Some(name)) if is_its(name));
    let gone = |step: &Step| matches!(step, Step::Remove(name) if is_its(name));
    let (first, last) = (steps.iter().rposition(made), steps.iter().rposition(gone));
    let ends: Vec<usize> = (first.expect("one is made")..=last.expect("it goes")).collect();
    let failures = each(&ends, |end| {
        let loss = Loss { content: Content::Kept, names: Names::Lost };
        let (left, base) = (ram_dir(), &world.recorder.base);
        Disk::after_power_loss(base, &steps, *end, loss, &mut Chance(1)).store(left.path());
        let rows = restart(left.path()).map(|restarted| restarted.rows);
        let allowed = rows.and_then(|rows| Known::at(&effects, 0, &steps[..*end]).allows(&rows));
        allowed.map_err(|error| format!("after step {end}: {error}"))
    });
    report("a transaction over two databases", &failures);
}

/// SQLite rolls it back in one database after the other.
#[test]
fn a_transaction_whose_super_journal_could_not_go_for_good_is_in_none() {
    let mode = Mode::new("delete", "full", true);
    let mut world = started(World::start(mode, &Disk::default(), Vec::new(), None));
    for act in [Act::Begin, Act::Both] {
        world.act(act).unwrap();
    }
    fault::arm_here(Fault { label: "super-journal:remove".to_owned(), after: 1, errno: libc::EIO });
    let first = world.recorder.steps().len();
    world.act(Act::Both).expect_err("its removal is not durable");
    assert!(!fault::disarm_here());
    let (steps, effects) = (world.recorder.steps(), world.effects.clone());
    let ends: Vec<(usize, u64)> =
        (first..=steps.len()).flat_map(|end| (1..=5).map(move |seed| (end, seed))).collect();
    let failures = each(&ends, |&(end, seed)| {
        let loss = Loss { content: Content::Kept, names: Names::InOrder };
        let (left, base) = (ram_dir(), &world.recorder.base);
        Disk::after_power_loss(base, &steps, end, loss, &mut Chance(seed)).store(left.path());
        let rows = restart(left.path()).map(|restarted| restarted.rows);
        let allowed = rows.and_then(|rows| Known::at(&effects, 0, &steps[..end]).allows(&rows));
        allowed.map_err(|error| format!("after step {end}, {seed}: {error}"))
    });
    report("a transaction that is rolled back in two databases", &failures);
}

/// Its frames stand on pages that nobody but the import has written.
#[test]
fn a_commit_after_an_import_survives() {
    let mode = Mode::new("wal", "full", true);
    let mut world = started(World::start(mode, &Disk::default(), Vec::new(), None));
    for act in [Act::Begin, Act::Insert, Act::Import, Act::Insert] {
        world.act(act).unwrap();
    }
    let left = ram_dir();
    least(&world, world.recorder.steps().len()).store(left.path());
    assert_eq!(restart(left.path()).unwrap().rows, BTreeSet::from([2, 3]));
}

/// A start that dies between making directories and their sync leaves that to the next one.
#[test]
fn directories_of_a_start_that_died_are_made_durable_by_the_next() {
    let mode = Mode::new("delete", "full", true);
    let mut world = started(World::start(mode, &Disk::default(), Vec::new(), None));
    world.act(Act::Begin).unwrap();
    let steps = world.recorder.steps();
    let ltx = Path::new("data/dbs/db/ltx");
    let made = steps.iter().position(|step| matches!(step, Step::MakeDir(dir) if dir == ltx));
    let died = Disk::after_crash(&world.recorder.base, &steps, made.unwrap() + 1);
    let next = started(World::start(mode, &died, Vec::new(), None));
    let synced = |name: &str| {
        let is_it = |step: &Step| matches!(step, Step::SyncDir(dir, _) if dir == Path::new(name));
        next.recorder.steps().iter().any(is_it)
    };
    for name in ["", "data", "data/dbs", "data/dbs/db"] {
        assert!(synced(name), "{name:?}");
    }
}

#[test]
fn what_a_start_sets_aside_is_not_lost_with_the_power() {
    let mode = Mode::new("delete", "full", true);
    let base = base(mode);
    let made = ram_dir();
    base.disk.store(made.path());
    let newest = image::chain_files(&image::directory(&data(made.path()), DB)).pop().unwrap().2;
    fs::write(&newest, b"torn").unwrap();
    let world = started(World::start(mode, &Disk::load(made.path()), Vec::new(), None));
    let steps = world.recorder.steps();
    let is_aside = |step: &Step| matches!(step, Step::Rename(_, to) if to.starts_with("data/dbs/db/lost+found"));
    assert!(steps.iter().any(is_aside));
    for end in 0..=steps.len() {
        let left = ram_dir();
        least(&world, end).store(left.path());
        let found = contents(left.path());
        assert!(found.values().any(|content| content == b"torn"), "after step {end}");
    }
}

/// Nothing would tell that the pages are older than their checksums: length, inode and time of the
/// database file may be durable before its pages.
#[test]
fn checksums_are_saved_only_of_pages_that_are_durable() {
    let feed = Feed::new(&rollback_feed(), true);
    let root = ram_dir();
    let (recorder, _watching) = Recorder::start(root.path(), None);
    let engine = replica(root.path(), true).unwrap();
    apply_all(&engine, &feed.sent);
    engine.close().unwrap();
    let steps = recorder.steps();
    let name = Path::new("data/dbs/db/checksums");
    let is_save = |step: &Step| matches!(step, Step::Rename(_, to) if to == name);
    let saved = steps.iter().position(is_save).expect("checksums are saved");
    let is_synced = |step: &Step| matches!(step, Step::SyncDir(dir, _) if name.starts_with(dir));
    let saved = saved + 1 + steps[saved..].iter().position(is_synced).expect("for good");
    let whole = Disk::after_crash(&recorder.base, &steps, saved);
    let left = Disk::after_power_loss(&recorder.base, &steps, saved, lost(), &mut Chance(1));
    let database = "data/dbs/db/database";
    assert!(whole.content(database).is_some());
    assert!(left.content(database) == whole.content(database));
}

#[test]
fn no_ltx_file_is_removed_before_what_it_explains_is_durable() {
    let feed = Feed::new(&rollback_feed(), true);
    let root = ram_dir();
    let (recorder, _watching) = Recorder::start(root.path(), None);
    let engine = replica(root.path(), true).unwrap();
    apply_all(&engine, &feed.sent);
    let db = engine.database(DB).unwrap();
    assert!(db.retain(Duration::ZERO, None).unwrap() > 0);
    let steps = recorder.steps();
    let left = Disk::after_power_loss(
        &recorder.base,
        &steps,
        steps.len(),
        Loss { names: Names::Kept, ..lost() },
        &mut Chance(1),
    );
    let dies = ram_dir();
    left.store(dies.path());
    assert_eq!(restart(dies.path()).unwrap().pos, db.pos());
    engine.close().unwrap();
}

/// A few transactions of a database in rollback mode.
fn rollback_feed() -> Script {
    let mode = Mode::new("delete", "full", true);
    let acts = vec![Act::Insert, Act::Large, Act::Insert, Act::Insert];
    Script { name: "rollback", mode, finds: Finds::Born, acts }
}

fn apply_all(engine: &Engine, sent: &[Vec<u8>]) {
    for bytes in sent {
        let target = receive(engine, bytes).unwrap();
        let db = engine.database(DB).unwrap();
        wait::until_true("the transaction", || db.pos() == target);
    }
}

/// Every file below `dir` with its content.
pub fn contents(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(contents(&path)),
            false => _ = found.insert(path.clone(), fs::read(&path).unwrap()),
        }
    }
    found
}
