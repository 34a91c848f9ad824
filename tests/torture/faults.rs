//! One call fails, or is the last one: for every call of every operation.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use litefs::engine::{DbState, Engine, Role};
use litefs::os::fault::{self, Fault};

use super::disk::{Content, Disk, Loss, Names, Recorder, Step, Trouble};
use super::script::{
    Act, DB, Effect, Known, Mode, NotStarted, World, follow_up, key, open, receive, replica,
    replicate, restart,
};
use super::{each, is_whole, ram_dir, seed};
use crate::support::chance::Chance;
use crate::support::wait;

/// What a run does.
#[derive(Debug, Clone)]
pub struct Script {
    pub name: &'static str,
    pub mode: Mode,
    /// It begins without a data directory.
    pub is_born: bool,
    pub acts: Vec<Act>,
}

/// Everything a node does to its files, in small pieces.
pub fn scripts() -> Vec<Script> {
    use Act::*;
    let wal = [
        Insert,
        Large,
        RolledBack,
        Checkpoint("PASSIVE"),
        Insert,
        Checkpoint("RESTART"),
        Insert,
        Shrink,
        Checkpoint("TRUNCATE"),
        Insert,
    ];
    let journal = [Insert, Large, RolledBack, Shrink, Vacuum, Insert, Retain];
    let burst = [Burst, Burst, Burst, Burst, Insert, Checkpoint("FULL"), Burst, Insert, Retain];
    let ends = [Insert, Reconnect, Insert, Vacuum, Reconnect, Insert];
    let whole = [Insert, Export, Import, Insert, Drop, Insert, Export];
    let script = |name, mode, acts: &[Act]| {
        let acts = acts.to_vec();
        Script { name, mode, is_born: false, acts }
    };
    let born = [Begin, Insert, Large, Insert, Reconnect, Insert];
    let born = |name, mode| Script { is_born: true, ..script(name, mode, &born) };
    vec![
        script("wal", Mode::new("wal", "full", true), &wal),
        script("wal without passthrough", Mode::new("wal", "full", false), &wal),
        script("wal, normal", Mode::new("wal", "normal", true), &wal),
        script("merge", Mode::new("wal", "normal", true), &burst),
        script("ends of the wal", Mode::new("wal", "full", true), &ends),
        script("ends of the wal without passthrough", Mode::new("wal", "full", false), &ends),
        script("delete", Mode::new("delete", "full", true), &journal),
        script("delete, off", Mode::new("delete", "off", true), &journal),
        script("truncate", Mode::new("truncate", "normal", true), &journal),
        script("persist", Mode::new("persist", "full", true), &journal),
        script("whole, wal", Mode::new("wal", "full", true), &whole),
        script("whole, delete", Mode::new("delete", "full", true), &whole),
        born("new, wal", Mode::new("wal", "full", true)),
        born("new, delete", Mode::new("delete", "full", true)),
        script(
            "switch",
            Mode::new("delete", "full", true),
            &[Insert, Switch("wal"), Insert, Switch("delete"), Insert, Switch("wal")],
        ),
    ]
}

/// What a script begins with: a node that died with a few transactions.
#[derive(Default)]
pub struct Base {
    pub disk: Disk,
    pub effects: Vec<Effect>,
}

pub fn base(mode: Mode) -> Base {
    let mut world = started(World::start(mode, &Disk::default(), Vec::new(), None));
    world.begin().unwrap();
    for act in [Act::Insert, Act::Large, Act::Insert] {
        world.act(act).unwrap();
    }
    let steps = world.recorder.steps();
    let disk = Disk::after_crash(&world.recorder.base, &steps, steps.len());
    Base { disk, effects: world.effects.clone() }
}

pub fn started(world: Result<World, NotStarted>) -> World {
    world.unwrap_or_else(|not| panic!("{}", not.reason))
}

/// A run of a script without trouble.
pub struct Calm {
    pub script: Script,
    pub base: Base,
    /// What was there before, and what happened.
    pub start: Disk,
    pub steps: Vec<Step>,
    pub effects: Vec<Effect>,
    /// Where the database was.
    pub positions: BTreeSet<(u64, u64)>,
    /// The label of each call.
    pub labels: Vec<String>,
}

pub fn calm(script: &Script) -> Calm {
    let base = if script.is_born { Base::default() } else { base(script.mode) };
    let mut world = started(World::start(script.mode, &base.disk, base.effects.clone(), None));
    for act in &script.acts {
        if let Err(error) = world.act(*act) {
            panic!("{}: {act:?}: {error}", script.name);
        }
        world.check_in_use().unwrap();
    }
    world.close().unwrap();
    let positions = world.positions.lock().unwrap().clone();
    Calm {
        script: script.clone(),
        start: world.recorder.base.clone(),
        steps: world.recorder.steps(),
        effects: world.effects.clone(),
        positions,
        labels: world.recorder.labels(),
        base,
    }
}

pub const TROUBLES: [Trouble; 6] = [
    Trouble::Errno(libc::EIO),
    Trouble::Errno(libc::ENOSPC),
    Trouble::Errno(libc::EINTR),
    Trouble::Short,
    Trouble::ShortAndFull,
    Trouble::Full,
];

/// One call of a run that is hit.
struct Case<'a> {
    calm: &'a Calm,
    call: usize,
    trouble: Trouble,
    /// The run waits until the node has recovered from it.
    patient: bool,
    replicates: bool,
}

impl Case<'_> {
    fn run(&self, hits: &Hits) -> Result<(), String> {
        let Calm { script, base, .. } = self.calm;
        let mut told = Vec::new();
        let what = |told: &[String], hit: &str, error: String| {
            format!(
                "{} call {} {:?} at {hit}, patient: {}: {error}; told {told:?}",
                script.name, self.call, self.trouble, self.patient
            )
        };
        let trouble = Some((self.call, self.trouble));
        let world = World::start(script.mode, &base.disk, base.effects.clone(), trouble);
        let mut world = match world {
            Ok(world) => world,
            Err(NotStarted { root, recorder, reason }) => {
                let hit = recorder.hit().unwrap_or_default();
                hits.note(&hit);
                told.push(reason);
                recorder.calm();
                let known = Known::at(&base.effects, base.effects.len(), &[]);
                return found(&known, restart(root.path()))
                    .map_err(|error| what(&told, &hit, error));
            }
        };
        let mut waited = false;
        for act in &script.acts {
            if let Err(error) = world.act(*act) {
                told.push(format!("{act:?}: {error}"));
                if self.patient && !waited && world.recorder.hit().is_some() {
                    let hit = world.recorder.hit().unwrap_or_default();
                    world.wait_until_mended().map_err(|error| what(&told, &hit, error))?;
                    waited = true;
                }
            }
            let hit = world.recorder.hit().unwrap_or_default();
            world.check_in_use().map_err(|error| what(&told, &hit, error))?;
        }
        let Some(hit) = world.recorder.hit() else { return Ok(()) };
        hits.note(&hit);
        let what = |error: String| what(&told, &hit, error);
        let harmless = matches!(self.trouble, Trouble::Errno(libc::EINTR) | Trouble::Short);
        if harmless && !told.is_empty() {
            return Err(what("it should not matter".to_owned()));
        }
        let steps = world.recorder.steps();
        let known = Known::at(&world.effects, base.effects.len(), &steps);
        let crashed = ram_dir();
        Disk::after_crash(&world.recorder.base, &steps, steps.len()).store(crashed.path());
        world.recorder.calm();
        let _ = world.close();
        let after = |when: &str, error: String| what(format!("{when}: {error}"));
        found(&known, restart(crashed.path())).map_err(|error| after("after a crash", error))?;
        found(&known, restart(world.root.path())).map_err(|error| after("after a stop", error))?;
        if self.replicates {
            replicate(crashed.path()).map_err(|error| after("a replica", error))?;
        }
        Ok(())
    }
}

fn found(known: &Known, restarted: Result<super::script::Restarted, String>) -> Result<(), String> {
    known.allows(&restarted?.rows)
}

/// Which calls were hit, for the report.
#[derive(Default)]
struct Hits {
    runs: AtomicUsize,
    labels: Mutex<BTreeMap<String, usize>>,
}

impl Hits {
    fn note(&self, hit: &str) {
        self.runs.fetch_add(1, Ordering::Relaxed);
        let label = hit.split(": ").next().unwrap_or_default().to_owned();
        *self.labels.lock().unwrap().entry(label).or_default() += 1;
    }
}

/// How many of `all` are tried, unless all are.
pub fn stride(all: usize, sample: usize) -> usize {
    if is_whole() { 1 } else { (all / sample).max(1) }
}

/// Calls with what happens to them: of each label one, or all.
fn picks(labels: &[String], chance: &mut Chance) -> Vec<(usize, Trouble)> {
    if is_whole() {
        let only = std::env::var("LITEFS_TEST_LABEL").unwrap_or_default();
        let with_all = |call| TROUBLES.iter().map(move |trouble| (call, *trouble));
        let calls = (0..labels.len()).filter(|call| labels[*call].starts_with(&only));
        return calls.flat_map(with_all).collect();
    }
    let mut by_label: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (call, label) in labels.iter().enumerate() {
        by_label.entry(label).or_default().push(call);
    }
    let one_of = |calls: &Vec<usize>| {
        let call = calls[chance.below(calls.len() as u64) as usize];
        (call, TROUBLES[chance.below(TROUBLES.len() as u64) as usize])
    };
    // A shorter file needs no room; what came of it once stands in `docs/testing.md` as open.
    let needs_room = |(call, trouble): &(usize, Trouble)| {
        !(labels[*call] == "database:truncate" && matches!(trouble, Trouble::Errno(libc::ENOSPC)))
    };
    by_label.values().map(one_of).filter(needs_room).collect()
}

#[track_caller]
pub fn report(what: &str, failures: &[String]) {
    assert!(failures.is_empty(), "{what}: {} failures, the first: {}", failures.len(), failures[0]);
}

#[test]
fn every_call_may_fail() {
    let mut chance = Chance(seed());
    let calms: Vec<Calm> = chosen(scripts()).iter().map(calm).collect();
    let all: usize = calms.iter().map(|calm| calm.labels.len()).sum();
    let mut cases = Vec::new();
    for calm in &calms {
        for (call, trouble) in picks(&calm.labels, &mut chance) {
            let patient = chance.below(if is_whole() { 5 } else { 20 }) == 0;
            let replicates = chance.below(4) == 0;
            cases.push(Case { calm, call, trouble, patient, replicates });
        }
    }
    let hits = Hits::default();
    let failures = each(&cases, |case| case.run(&hits));
    println!("{all} calls of {} scripts, {} hit", calms.len(), hits.runs.load(Ordering::Relaxed));
    println!("{:?}", hits.labels.lock().unwrap());
    report("a call that fails", &failures);
}

/// The scripts that `LITEFS_TEST_SCRIPT` is part of the name of.
pub fn chosen(scripts: Vec<Script>) -> Vec<Script> {
    match std::env::var("LITEFS_TEST_SCRIPT") {
        Ok(name) => scripts.into_iter().filter(|script| script.name.contains(&name)).collect(),
        Err(_) => scripts,
    }
}

#[test]
fn every_call_may_be_the_last() {
    let mut chance = Chance(seed());
    let calms: Vec<Calm> = chosen(scripts()).iter().map(calm).collect();
    let mut cases = Vec::new();
    let all: usize = calms.iter().map(|calm| calm.steps.len() + 1).sum();
    let stride = stride(all, 250);
    for calm in &calms {
        let first = chance.below(stride as u64) as usize;
        cases.extend((first..=calm.steps.len()).step_by(stride).map(|end| (calm, end)));
    }
    let failures = each(&cases, |(calm, end)| crash(calm, *end, end % 8 == 0));
    println!("{all} moments of {} scripts, {} tried", calms.len(), cases.len());
    report("a crash", &failures);
}

fn crash(calm: &Calm, end: usize, replicates: bool) -> Result<(), String> {
    let Calm { script, base, steps, .. } = calm;
    let crashed = ram_dir();
    Disk::after_crash(&calm.start, steps, end).store(crashed.path());
    let known = Known::at(&calm.effects, base.effects.len(), &steps[..end]);
    let what = |error: String| {
        let last = steps[..end].last();
        let mut last = format!("{last:?}");
        last.truncate(120);
        format!("{} after step {end} ({last}): {error}", script.name)
    };
    let restarted = restart(crashed.path()).map_err(what)?;
    known.allows(&restarted.rows).map_err(what)?;
    if !restarted.pos.is_zero() && !calm.positions.contains(&key(restarted.pos)) {
        return Err(what(format!("at {}, where it never was", restarted.pos)));
    }
    if replicates {
        replicate(crashed.path()).map_err(what)?;
    }
    Ok(())
}

/// A primary that has what a replica is sent.
pub struct Primary {
    engine: Arc<Engine>,
    root: tempfile::TempDir,
}

impl Drop for Primary {
    fn drop(&mut self) {
        self.engine.close().unwrap();
    }
}

/// What a replica is sent.
pub fn feed(script: &Script) -> (Primary, Vec<Vec<u8>>) {
    let mut world = started(World::start(script.mode, &Disk::default(), Vec::new(), None));
    world.begin().unwrap();
    let mut sent = Vec::new();
    let mut at = ltx::Pos::ZERO;
    let mut send = |world: &World| {
        let db = world.db().unwrap();
        while let Some(bytes) = super::script::next_for(&db, at) {
            let (header, trailer) = ltx::verify(&bytes[..]).unwrap();
            at = ltx::Pos { txid: header.max_txid, checksum: trailer.post_apply };
            sent.push(bytes);
        }
    };
    send(&world);
    for act in &script.acts {
        world.act(*act).unwrap();
        send(&world);
    }
    world.close().unwrap();
    let root = ram_dir();
    Disk::load(world.root.path()).store(root.path());
    let engine = open(root.path(), 1).unwrap();
    engine.set_role(Role::Primary);
    (Primary { engine, root }, sent)
}

/// What a replica did.
struct Applied {
    labels: Vec<String>,
    start: Disk,
    steps: Vec<Step>,
}

/// A replica applies what it is sent, and a call is hit meanwhile. It stays a replica that can follow:
/// in the same process if it is `patient`, after a crash, and after a stop.
fn apply(
    primary: &Primary,
    sent: &[Vec<u8>],
    passthrough: bool,
    trouble: Option<(usize, Trouble)>,
    patient: bool,
    hits: &Hits,
) -> Result<Applied, String> {
    let root = ram_dir();
    let (recorder, watching) = Recorder::start(root.path(), trouble);
    let what = |error: String| format!("{trouble:?} at {:?}: {error}", recorder.hit());
    let primary_db = primary.engine.database(DB).unwrap();
    if let Ok(engine) = replica(root.path(), passthrough) {
        for bytes in sent {
            let Ok(target) = receive(&engine, bytes) else { break };
            let db = engine.database(DB).unwrap();
            wait::until_true("an outcome", || {
                db.pos() == target || db.received_pos().is_zero() || db.state() != DbState::Ready
            });
            if db.pos() != target {
                break;
            }
            // Old files go only when what they explain is durable.
            let _ = db.retain(Duration::ZERO, None);
        }
        let steps = recorder.steps();
        let crashed = ram_dir();
        Disk::after_crash(&recorder.base, &steps, steps.len()).store(crashed.path());
        recorder.calm();
        let went_on = match patient && recorder.hit().is_some() {
            true => follow_up(&primary_db, primary.root.path(), &engine, root.path()),
            false => Ok(()),
        };
        let closed = engine.close();
        went_on.map_err(|error| what(format!("tried again: {error}")))?;
        if trouble.is_none() {
            closed.map_err(|error| what(litefs::engine::chain_text(&error)))?;
        }
        rejoin(primary, crashed.path()).map_err(|error| what(format!("after a crash: {error}")))?;
    }
    recorder.calm();
    drop(watching);
    if let Some(hit) = recorder.hit() {
        hits.note(&hit);
    }
    rejoin(primary, root.path()).map_err(|error| what(format!("after a stop: {error}")))?;
    let (labels, steps) = (recorder.labels(), recorder.steps());
    Ok(Applied { labels, start: recorder.base.clone(), steps })
}

/// A replica on what stands in `root` follows again, and becomes equal.
fn rejoin(primary: &Primary, root: &Path) -> Result<(), String> {
    let replica = replica(root, true).map_err(|error| litefs::engine::chain_text(&error))?;
    let db = primary.engine.database(DB).unwrap();
    let result = follow_up(&db, primary.root.path(), &replica, root);
    let closed = replica.close().map_err(|error| litefs::engine::chain_text(&error));
    result.and(closed)
}

/// What a replica is sent in these tests, in which mode, and whether it has passthrough.
fn feeds() -> Vec<(Script, bool)> {
    use Act::*;
    let acts = [
        Insert,
        Large,
        Shrink,
        Checkpoint("TRUNCATE"),
        Insert,
        Import,
        Insert,
        Drop,
        Insert,
        Switch("delete"),
        Insert,
        Vacuum,
    ];
    let of = |name, journal, acts: &[Act]| {
        let mode = Mode::new(journal, "full", true);
        Script { name, mode, is_born: true, acts: acts.to_vec() }
    };
    let wal = of("replica, wal", "wal", &acts);
    let journal = of("replica, delete", "delete", &[Insert, Large, Shrink, Import, Insert]);
    vec![(wal.clone(), true), (wal, false), (journal, true)]
}

#[test]
fn every_call_of_a_replica_may_fail() {
    let mut chance = Chance(seed());
    let hits = Hits::default();
    let (mut failures, mut calls) = (Vec::new(), 0);
    for (script, passthrough) in feeds() {
        let (primary, sent) = feed(&script);
        let calm = apply(&primary, &sent, passthrough, None, false, &hits).unwrap();
        calls += calm.labels.len();
        let cases = picks(&calm.labels, &mut chance);
        failures.extend(each(&cases, |&(call, trouble)| {
            let patient = call % 4 == 0;
            apply(&primary, &sent, passthrough, Some((call, trouble)), patient, &hits)
                .map(drop)
                .map_err(|error| format!("{}, passthrough {passthrough}: {error}", script.name))
        }));
    }
    println!("{calls} calls, {} hit", hits.runs.load(Ordering::Relaxed));
    println!("{:?}", hits.labels.lock().unwrap());
    report("a call of a replica that fails", &failures);
}

/// The index and the WAL change one after the other.
#[test]
fn a_wal_that_could_not_be_emptied_is_emptied_later() {
    let hits = Hits::default();
    let (script, passthrough) = feeds().remove(0);
    let (primary, sent) = feed(&script);
    let calm = apply(&primary, &sent, passthrough, None, false, &hits).unwrap();
    let is_its = |label: &String| label == "apply:wal" || label == "apply:index";
    let calls: Vec<usize> =
        (0..calm.labels.len()).filter(|call| is_its(&calm.labels[*call])).collect();
    assert!(calls.len() > 5, "{calls:?}");
    // As many as fit into a second; the rest have their turn above.
    let failures = each(&calls, |call| {
        let trouble = Some((*call, Trouble::Errno(libc::EIO)));
        apply(&primary, &sent, passthrough, trouble, true, &hits).map(drop)
    });
    report("an empty wal", &failures);
}

#[test]
fn every_moment_of_a_replica_may_be_the_last() {
    let mut chance = Chance(seed());
    let (mut failures, mut moments, mut tried) = (Vec::new(), 0, 0);
    for (script, passthrough) in feeds() {
        let (primary, sent) = feed(&script);
        let hits = Hits::default();
        let Applied { start, steps, .. } =
            apply(&primary, &sent, passthrough, None, false, &hits).unwrap();
        let by = stride(steps.len(), 45);
        let first = chance.below(by as u64) as usize;
        let ends: Vec<usize> = (first..=steps.len()).step_by(by).collect();
        let cases: Vec<(usize, Option<Loss>, u64)> = ends
            .iter()
            .enumerate()
            .flat_map(|(number, end)| {
                let loss = Loss::nth(number);
                let whole = (number % 3 == 0).then_some((*end, None, 0));
                whole.into_iter().chain([(*end, Some(loss), chance.next())])
            })
            .collect();
        (moments, tried) = (moments + steps.len() + 1, tried + cases.len());
        failures.extend(each(&cases, |&(end, loss, seed)| {
            let disk = match loss {
                None => Disk::after_crash(&start, &steps, end),
                Some(loss) => Disk::after_power_loss(&start, &steps, end, loss, &mut Chance(seed)),
            };
            let what = |error| format!("{} after step {end} {loss:?} {seed}: {error}", script.name);
            let (looked_at, crashed) = (ram_dir(), ram_dir());
            disk.store(looked_at.path());
            disk.store(crashed.path());
            restart(looked_at.path()).map_err(what)?;
            rejoin(&primary, crashed.path()).map_err(what)
        }));
    }
    println!("{moments} moments, {tried} images");
    report("a replica that dies", &failures);
}

/// A WAL that is moved into the database file under all locks may be lost but for its beginning, which
/// must not look like something new on top of that.
#[test]
fn the_beginning_of_a_wal_is_not_taken_for_its_end() {
    let (script, passthrough) = feeds().remove(0);
    let (primary, sent) = feed(&script);
    let hits = Hits::default();
    let Applied { start, steps, .. } =
        apply(&primary, &sent, passthrough, None, false, &hits).unwrap();
    let is_sync = |end: &usize| matches!(steps[*end - 1], Step::Sync(..));
    let ends: Vec<usize> = (1..=steps.len()).filter(is_sync).collect();
    assert!(ends.len() > 10, "{ends:?}");
    let failures = each(&ends, |end| {
        let lost = Loss { content: Content::Lost, names: Names::Kept };
        let disk = Disk::after_power_loss(&start, &steps, *end, lost, &mut Chance(1)).in_one_tick();
        let root = ram_dir();
        disk.store(root.path());
        restart(root.path()).map(drop).map_err(|error| format!("after step {end}: {error}"))
    });
    report("a checkpoint", &failures);
}

/// Where the wal-index is out of sight, the frames of a commit that was refused would be taken for
/// committed, and SQLite removes them with the WAL.
#[test]
fn a_commit_whose_sync_failed_is_none_without_passthrough() {
    use Act::*;
    let mode = Mode::new("wal", "full", false);
    for acts in [[Insert, Reconnect, Insert], [Insert, Insert, Reconnect], [Large, Large, Insert]] {
        let mut world = started(World::start(mode, &Disk::default(), Vec::new(), None));
        world.act(Begin).unwrap();
        world.act(acts[0]).unwrap();
        let pos = world.db().unwrap().pos();
        fault::arm_here(Fault { label: "files:sync".to_owned(), after: 0, errno: libc::EIO });
        assert!(world.act(Insert).is_err());
        assert!(!fault::disarm_here());
        assert_eq!(world.db().unwrap().pos(), pos, "{acts:?}");
        for act in &acts[1..] {
            world.act(*act).unwrap();
            world.check_in_use().unwrap();
        }
        world.close().unwrap();
        let rows = restart(world.root.path()).unwrap().rows;
        assert!(!rows.contains(&2), "{rows:?}");
    }
}
