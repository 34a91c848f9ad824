//! One call fails, or is the last one: for every call of every operation.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use litefs::engine::{DbState, Engine, Role};
use litefs::os::fault::{self, Fault};
use ltx::Pos;

use super::disk::{Called, Content, Disk, Hit, Loss, Names, Plan, Recorder, Step, Trouble};
use super::power::{Promise, contents};
use super::script::{
    Act, DB, Effect, Known, Late, Mode, NotStarted, World, data, follow_up, key, open, receive,
    replica, replicate, restart,
};
use super::{each, is_whole, labels, ram_dir, seed};
use crate::support::chance::Chance;
use crate::support::{image, wait};

/// What a run does.
#[derive(Debug, Clone)]
pub struct Script {
    pub name: &'static str,
    pub mode: Mode,
    pub finds: Finds,
    pub acts: Vec<Act>,
}

/// What the first start of a script finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finds {
    /// No data directory.
    Born,
    /// What a node left that died.
    Died,
    /// A backup, and no data directory.
    Lost,
    /// As [`Finds::Died`], and a client that goes on meanwhile.
    Late,
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
        Script { name, mode, finds: Finds::Died, acts }
    };
    let born = [Act::Begin, Insert, Large, Insert, Reconnect, Insert];
    let born = |name, mode| Script { finds: Finds::Born, ..script(name, mode, &born) };
    let mut all = vec![
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
    ];
    all.extend(more_scripts());
    all
}

/// What a node does beside that.
fn more_scripts() -> Vec<Script> {
    use Act::*;
    let both = [Insert, Both, Both, Insert, Both, Restart, Both];
    let backup = [
        Join,
        Backup,
        Insert,
        Burst,
        Burst,
        Large,
        Backup,
        Retain,
        Insert,
        Restart,
        Backup,
        Vacuum,
        NoBackup("backup:file"),
        Retain,
        Restart,
        Insert,
        Backup,
    ];
    let http = [
        Insert, Upload, Follow, Insert, Download, Large, Burst, Follow, Insert, Insert, Restart,
        Follow, Insert, Retain, Follow,
    ];
    let deaths = [Insert, Dies, Export, Insert, Dies, Import, Large, Dies, Restart, Insert];
    let refused = [
        Insert,
        Refused("files:sync"),
        Insert,
        Unseen("read:wal"),
        Mended,
        Insert,
        Checkpoint("TRUNCATE"),
        Insert,
        Reconnect,
        Insert,
        Dies,
        Insert,
    ];
    let script = |name, mode, acts: &[Act]| {
        let acts = acts.to_vec();
        Script { name, mode, finds: Finds::Died, acts }
    };
    let (wal, delete) = (Mode::new("wal", "full", true), Mode::new("delete", "full", true));
    let blind = Mode::new("wal", "full", false);
    vec![
        script("both, delete", delete, &both),
        script("both, truncate", Mode::new("truncate", "normal", true), &both),
        script("both, persist", Mode::new("persist", "full", true), &both),
        script("both, wal", wal, &both),
        script("backup, wal", Mode::new("wal", "normal", true), &backup),
        script("backup, delete", delete, &backup),
        script(
            "backup, off",
            Mode::new("delete", "off", true),
            &[Insert, Insert, NoBackup("chain:sync"), Mended, Insert, Backup],
        ),
        Script { finds: Finds::Lost, ..script("restored", wal, &[Restore, Insert, Large, Backup]) },
        Script { finds: Finds::Late, ..script("late", wal, &[Insert, Large, Restart, Insert]) },
        script("http", wal, &http),
        script("deaths", delete, &deaths),
        script("refused, wal", wal, &refused),
        script("refused, wal without passthrough", blind, &refused),
        script(
            "refused, delete",
            delete,
            &[Insert, Refused("files:remove"), Insert, Refused("chain:ltx"), Insert],
        ),
    ]
}

/// What a script begins with: a node that died with a few transactions.
#[derive(Default)]
pub struct Base {
    pub disk: Disk,
    pub effects: Vec<Effect>,
    /// What a client writes to the WAL when it is taken over.
    pub late: Option<Late>,
}

impl Script {
    fn base(&self) -> Base {
        match self.finds {
            Finds::Born => Base::default(),
            Finds::Died => base(self.mode),
            Finds::Lost => lost(self.mode),
            Finds::Late => late(self.mode),
        }
    }
}

impl Base {
    /// A node on it.
    fn start(&self, mode: Mode, trouble: Option<Plan>) -> Result<World, NotStarted> {
        World::start_with(mode, &self.disk, self.begun(), trouble, self.late.as_ref())
    }

    /// What clients have begun when the node starts.
    fn begun(&self) -> Vec<Effect> {
        let late = self.late.iter().map(|_| Effect::Row);
        self.effects.iter().copied().chain(late).collect()
    }
}

/// A world with a few transactions.
fn few(mode: Mode) -> World {
    let mut world = started(World::start(mode, &Disk::default(), Vec::new(), None));
    world.begin().unwrap();
    for act in [Act::Insert, Act::Large, Act::Insert] {
        world.act(act).unwrap();
    }
    world
}

/// A backup of a node of which nothing else is left.
fn lost(mode: Mode) -> Base {
    let mut world = few(mode);
    for act in [Act::Backup, Act::Insert, Act::Backup] {
        world.act(act).unwrap();
    }
    world.close().unwrap();
    std::fs::remove_dir_all(data(world.root.path())).unwrap();
    let effects = world.effects.iter().copied().chain([Effect::Lost]).collect();
    Base { disk: Disk::load(world.root.path()), effects, late: None }
}

/// A node that died while a client was in the middle of a commit, whose frames come late.
fn late(mode: Mode) -> Base {
    let mut world = few(mode);
    let steps = world.recorder.steps();
    let disk = Disk::after_crash(&world.recorder.base, &steps, steps.len());
    let effects = world.effects.clone();
    let wal = image::directory(&data(world.root.path()), DB).wal();
    let offset = std::fs::metadata(&wal).unwrap().len();
    world.act(Act::Insert).unwrap();
    let frames = std::fs::read(&wal).unwrap().split_off(offset as usize);
    assert!(!frames.is_empty());
    Base { disk, effects, late: Some(Late { offset, frames }) }
}

pub fn base(mode: Mode) -> Base {
    let world = few(mode);
    let steps = world.recorder.steps();
    let disk = Disk::after_crash(&world.recorder.base, &steps, steps.len());
    Base { disk, effects: world.effects.clone(), late: None }
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
    pub calls: Vec<Called>,
    pub reads: Vec<Called>,
}

impl Calm {
    /// Whether the database was at `pos`. A commit that fails after its LTX file is there has led to a position
    /// of which nobody is told, and counts if the node dies before it is withdrawn; what a late client writes
    /// counts if a start finds it whole.
    pub fn may_have_been_at(&self, pos: Pos) -> bool {
        let Script { finds, acts, .. } = &self.script;
        let refuses = |act: &Act| matches!(act, Act::Refused(_));
        let may_be_untold = matches!(finds, Finds::Late) || acts.iter().any(refuses);
        pos.is_zero() || may_be_untold || self.positions.contains(&key(pos))
    }
}

/// Each script without trouble, those that are chosen.
pub fn calms() -> &'static [Calm] {
    static CALMS: OnceLock<Vec<Calm>> = OnceLock::new();
    CALMS.get_or_init(|| {
        let scripts: Vec<_> =
            chosen(scripts()).into_iter().map(|script| (script, OnceLock::new())).collect();
        let failures = each(&scripts, |(script, done)| {
            let is_first = done.set(calm(script)).is_ok();
            is_first.then_some(()).ok_or_else(|| "played twice".to_owned())
        });
        report("a script without trouble", &failures);
        scripts.into_iter().filter_map(|(_, done)| done.into_inner()).collect()
    })
}

pub fn calm(script: &Script) -> Calm {
    let base = script.base();
    let mut world = started(base.start(script.mode, None));
    for act in &script.acts {
        if let Err(error) = world.act(*act) {
            panic!("{}: {act:?}: {error}", script.name);
        }
        // Who reads would put right what it left.
        if *act != Act::Dies {
            world.check_in_use().unwrap();
        }
    }
    world.close().unwrap();
    let positions = world.positions.lock().unwrap().clone();
    Calm {
        script: script.clone(),
        start: world.recorder.base.clone(),
        steps: world.recorder.steps(),
        effects: world.effects.clone(),
        positions,
        calls: world.recorder.calls(),
        reads: world.recorder.reads(),
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
    plan: Plan,
    /// The run waits until the node has recovered from it.
    patient: bool,
    replicates: bool,
    /// It also dies right after the hit.
    dies: bool,
    seed: u64,
}

impl Case<'_> {
    fn run(&self, hits: &Hits) -> Result<(), String> {
        let Calm { script, base, .. } = self.calm;
        let mut told = Vec::new();
        let what = |told: &[String], hit: Option<Hit>, error: String| {
            let hit = hit.map_or(String::new(), |hit| hit.what);
            let Case { plan, patient, seed, .. } = self;
            format!(
                "{} {plan:?} at {hit}, patient: {patient}, {seed}: {error}; told {told:?}",
                script.name
            )
        };
        let world = base.start(script.mode, Some(self.plan.clone()));
        let mut world = match world {
            Ok(world) => world,
            Err(NotStarted { root, recorder, reason }) => {
                let hit = recorder.hit();
                hits.note(hit.as_ref());
                told.push(reason);
                recorder.calm();
                let begun = base.begun();
                let known = Known::at(&begun, base.effects.len(), &recorder.steps());
                let kept = hit.as_ref().map(|hit| self.set_nothing_aside(hit, root.path()));
                return kept
                    .unwrap_or(Ok(()))
                    .and_then(|()| found(&known, restart(root.path())))
                    .and_then(|()| self.dies_after_hit(&recorder, &begun, hits))
                    .map_err(|error| what(&told, hit, error));
            }
        };
        let mut waited = false;
        for act in &script.acts {
            let was_hit = world.recorder.hit().is_some();
            if let Err(error) = world.act(*act) {
                told.push(format!("{act:?}: {error}"));
                if self.patient && !waited && world.recorder.hit().is_some() {
                    let hit = world.recorder.hit();
                    world.wait_until_mended().map_err(|error| what(&told, hit, error))?;
                    waited = true;
                }
            }
            let hit = world.recorder.hit();
            // After two failures the frames of a refused commit may stay until the next one.
            let is_hit_twice = matches!(act, Act::Unseen(_)) && !was_hit && hit.is_some();
            if *act != Act::Dies && !is_hit_twice {
                world.check_in_use().map_err(|error| what(&told, hit, error))?;
            }
        }
        if world.recorder.hit().is_none()
            && let Err(error) = world.close()
        {
            told.push(format!("the end: {error}"));
        }
        let Some(hit) = world.recorder.hit() else { return Ok(()) };
        hits.note(Some(&hit));
        let what = |error: String| what(&told, Some(hit.clone()), error);
        let harmless = matches!(self.plan.trouble, Trouble::Errno(libc::EINTR) | Trouble::Short);
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
        self.set_nothing_aside(&hit, world.root.path()).map_err(what)?;
        found(&known, restart(crashed.path())).map_err(|error| after("after a crash", error))?;
        found(&known, restart(world.root.path())).map_err(|error| after("after a stop", error))?;
        if self.replicates {
            replicate(crashed.path()).map_err(|error| after("a replica", error))?;
        }
        self.dies_after_hit(&world.recorder, &world.effects, hits).map_err(what)
    }

    /// What could not be read is not taken for damaged; only an import puts something in the place of a
    /// database that has failed.
    fn set_nothing_aside(&self, hit: &Hit, root: &Path) -> Result<(), String> {
        let is_replaced = self.calm.script.acts.contains(&Act::Import);
        match Disk::load(root).set_aside() {
            aside if aside > 0 && hit.label.starts_with("read:") && !is_replaced => {
                Err(format!("{aside} files in lost+found"))
            }
            _ => Ok(()),
        }
    }

    /// The node dies at the hit or a few calls later, or the power is lost at some moment after it.
    fn dies_after_hit(
        &self,
        recorder: &Recorder,
        effects: &[Effect],
        hits: &Hits,
    ) -> Result<(), String> {
        let Calm { script, base, .. } = self.calm;
        let Some(hit) = recorder.hit() else { return Ok(()) };
        let (steps, mut chance) = (recorder.steps(), Chance(self.seed));
        let known = |end: usize| Known::at(effects, base.effects.len(), &steps[..end]);
        let ends = [0, 1, 5].map(|later| recorder.steps_before(hit.calls + later));
        for end in ends.iter().take(if self.dies { 3 } else { 0 }) {
            let died = ram_dir();
            Disk::after_crash(&recorder.base, &steps, *end).store(died.path());
            hits.deaths.fetch_add(1, Ordering::Relaxed);
            found(&known(*end), restart(died.path()))
                .map_err(|error| format!("dead at step {end} of {ends:?}: {error}"))?;
        }
        if script.mode.synchronous == "off" {
            return Ok(());
        }
        let images = match (is_whole(), hit.is_sync, self.dies) {
            (_, true, _) | (true, ..) => 3,
            (false, false, dies) => usize::from(!dies),
        };
        for number in 0..images {
            let end = hit.step + chance.below((steps.len() - hit.step) as u64 + 1) as usize;
            let loss = Loss::nth(number + chance.below(20) as usize);
            let lost = ram_dir();
            Disk::after_power_loss(&recorder.base, &steps, end, loss, &mut chance)
                .store(lost.path());
            hits.losses.fetch_add(1, Ordering::Relaxed);
            let rows = restart(lost.path()).map(|restarted| restarted.rows);
            let allowed = rows.and_then(|rows| match script.mode.promise() {
                Promise::Kept => known(end).allows(&rows),
                Promise::Earlier => known(end).allows_earlier(&rows),
            });
            // Where names come back in any order, transactions may be missing in the chain, and then only what
            // was noted leads from the backup to its end.
            let is_unknown = |error: &String| {
                hit.label == "backup:state"
                    && loss.names == Names::Any
                    && error.contains("nothing here says that the one goes on from the other")
            };
            if allowed.as_ref().is_err_and(is_unknown) {
                continue;
            }
            allowed.map_err(|error| {
                if env::var_os("LITEFS_TEST_DUMP").is_some() {
                    super::power::dump(&steps[..end]);
                }
                let Hit { step, .. } = hit;
                format!("hit at step {step}, without power after {end} {loss:?}: {error}")
            })?;
        }
        Ok(())
    }
}

fn found(known: &Known, restarted: Result<super::script::Restarted, String>) -> Result<(), String> {
    known.allows(&restarted?.rows)
}

/// How often each label is among what is tried.
#[derive(Default)]
pub struct Sample(BTreeMap<String, usize>);

impl Sample {
    /// Whether another call of this label is tried: every one until there are `enough`, then a few.
    pub fn takes(&mut self, label: &str, enough: usize, chance: &mut Chance) -> bool {
        let count = self.0.entry(label.to_owned()).or_default();
        *count += 1;
        *count <= enough || is_whole() || chance.below(6) == 0
    }
}

/// Which calls were hit, for the report.
#[derive(Default)]
pub struct Hits {
    runs: AtomicUsize,
    pub deaths: AtomicUsize,
    pub losses: AtomicUsize,
    labels: Mutex<BTreeMap<String, usize>>,
}

impl Hits {
    pub fn note(&self, hit: Option<&Hit>) {
        let Some(hit) = hit else { return };
        self.runs.fetch_add(1, Ordering::Relaxed);
        *self.labels.lock().unwrap().entry(hit.label.clone()).or_default() += 1;
    }

    /// One of the calls of each label that was never hit: the last of them may not have come again.
    pub fn missed<'a>(&self, calls: &'a [Called]) -> Vec<&'a Called> {
        // Some are chosen.
        if ["LITEFS_TEST_SCRIPT", "LITEFS_TEST_LABEL"]
            .iter()
            .any(|name| env::var_os(name).is_some())
        {
            return Vec::new();
        }
        let labels = self.labels.lock().unwrap();
        let missed = calls.iter().filter(|called| !labels.contains_key(&called.label));
        let missed: BTreeMap<&str, &Called> =
            missed.map(|called| (called.label.as_str(), called)).collect();
        missed.into_values().collect()
    }

    /// Says what was hit; each of the labels that there are must be among it, but for those that a run comes
    /// to by chance.
    #[track_caller]
    pub fn report(&self, calls: &[&[Called]]) {
        let missed = calls.iter().flat_map(|calls| self.missed(calls));
        let missed: Vec<_> =
            missed.filter(|called| !labels::comes_by_chance(&called.label)).collect();
        assert!(missed.is_empty(), "never hit: {missed:?}");
        let labels = self.labels.lock().unwrap();
        let count = |of: &AtomicUsize| of.load(Ordering::Relaxed);
        let all: usize = calls.iter().map(|calls| calls.len()).sum();
        println!(
            "{all} calls, {} hit; {} deaths and {} power losses soon after it",
            count(&self.runs),
            count(&self.deaths),
            count(&self.losses)
        );
        println!("{labels:?}");
    }
}

/// How many of `all` are tried, unless all are.
pub fn stride(all: usize, sample: usize) -> usize {
    if is_whole() { 1 } else { (all / sample).max(1) }
}

/// What may happen to which call: of each label to one, or to all.
pub fn picks(calls: &[Called], chance: &mut Chance) -> Vec<Plan> {
    let troubles = |called: &Called| -> Vec<Trouble> {
        TROUBLES.into_iter().filter(|trouble| trouble.concerns(called.kind)).collect()
    };
    if is_whole() {
        let only = env::var("LITEFS_TEST_LABEL").unwrap_or_default();
        let calls = calls.iter().filter(|called| called.label.starts_with(&only));
        let with_all = |called: &Called| {
            let plans = troubles(called).into_iter().map(|trouble| called.with(trouble));
            plans.collect::<Vec<_>>()
        };
        return calls.flat_map(with_all).collect();
    }
    let mut by_label: BTreeMap<&str, Vec<&Called>> = BTreeMap::new();
    for called in calls {
        by_label.entry(&called.label).or_default().push(called);
    }
    let one_of = |calls: &Vec<&Called>| {
        let called = calls[chance.below(calls.len() as u64) as usize];
        let troubles = troubles(called);
        called.with(troubles[chance.below(troubles.len() as u64) as usize])
    };
    by_label.values().map(one_of).collect()
}

#[track_caller]
pub fn report(what: &str, failures: &[String]) {
    assert!(failures.is_empty(), "{what}: {} failures, the first: {}", failures.len(), failures[0]);
}

/// Hits the labels that were never hit, one script after the other.
fn run_missed(calms: &[Calm], of: impl Fn(&Calm) -> &[Called], hits: &Hits) -> Vec<String> {
    let mut failures = Vec::new();
    for calm in calms {
        let cases: Vec<Case<'_>> = hits
            .missed(of(calm))
            .into_iter()
            .map(|called| {
                let plan = called.first().with(IO_ERROR);
                Case { calm, plan, patient: false, replicates: false, dies: true, seed: 1 }
            })
            .collect();
        failures.extend(each(&cases, |case| case.run(hits)));
    }
    failures
}

#[test]
fn every_call_may_fail() {
    let mut chance = Chance(seed());
    let calms = calms();
    let (mut cases, mut sample) = (Vec::new(), Sample::default());
    for calm in calms {
        for plan in picks(&calm.calls, &mut chance) {
            if !sample.takes(&plan.label, 15, &mut chance) {
                continue;
            }
            let patient = chance.below(if is_whole() { 5 } else { 20 }) == 0;
            let (replicates, dies) = (chance.below(4) == 0, chance.below(4) == 0);
            let seed = chance.next();
            cases.push(Case { calm, plan, patient, replicates, dies, seed });
        }
    }
    let hits = Hits::default();
    let mut failures = each(&cases, |case| case.run(&hits));
    failures.extend(run_missed(calms, |calm| &calm.calls, &hits));
    report("a call that fails", &failures);
    hits.report(&calms.iter().map(|calm| &calm.calls[..]).collect::<Vec<_>>());
}

/// The scripts whose name has a part of `LITEFS_TEST_SCRIPT`, in which `|` stands between parts.
pub fn chosen(scripts: Vec<Script>) -> Vec<Script> {
    chosen_names(scripts, |script| script.name)
}

/// The same, of whatever has a name.
pub fn chosen_names<T>(all: Vec<T>, name_of: impl Fn(&T) -> &str) -> Vec<T> {
    match env::var("LITEFS_TEST_SCRIPT") {
        Ok(parts) => all
            .into_iter()
            .filter(|one| parts.split('|').any(|part| name_of(one).contains(part)))
            .collect(),
        Err(_) => all,
    }
}

#[test]
fn every_call_may_be_the_last() {
    let mut chance = Chance(seed());
    let calms = calms();
    let mut cases = Vec::new();
    let all: usize = calms.iter().map(|calm| calm.steps.len() + 1).sum();
    let stride = stride(all, 250);
    for calm in calms {
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
    if !calm.may_have_been_at(restarted.pos) {
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

/// What a replica begins with, and what it is sent.
pub struct Feed {
    pub name: &'static str,
    pub primary: Primary,
    pub passthrough: bool,
    pub start: Disk,
    pub sent: Vec<Vec<u8>>,
    /// Content of files that must be somewhere in the end.
    pub keeps: Vec<Vec<u8>>,
    /// The primary is one that may have all that it has.
    is_same_line: bool,
    /// Where it was with a history of its own that must be somewhere in the end.
    own: Option<ltx::Pos>,
}

impl Feed {
    /// A new replica of a node with this script.
    pub fn new(script: &Script, passthrough: bool) -> Feed {
        let mut world = started(World::start(script.mode, &Disk::default(), Vec::new(), None));
        world.begin().unwrap();
        let acts = script.acts.as_slice();
        let (primary, sent) = Primary::that_does(world, acts, ltx::Pos::ZERO);
        let name = script.name;
        let (start, keeps, own) = (Disk::default(), Vec::new(), None);
        Feed { name, primary, passthrough, start, sent, keeps, is_same_line: false, own }
    }

    /// A node that did something else than the primary since it died, and follows now.
    fn former(name: &'static str, mode: Mode, passthrough: bool, acts: &[Act]) -> Feed {
        let base = base(mode);
        let mut world = started(World::start(mode, &base.disk, base.effects.clone(), None));
        let common: Vec<_> = ltx_files(world.root.path()).into_values().collect();
        for act in acts {
            world.act(*act).unwrap();
        }
        let pos = world.db().unwrap().pos();
        let mut keeps: Vec<_> = ltx_files(world.root.path()).into_values().collect();
        keeps.retain(|file| !common.contains(file));
        let steps = world.recorder.steps();
        let start = Disk::after_crash(&world.recorder.base, &steps, steps.len());
        let other = started(World::start(mode, &base.disk, base.effects.clone(), None));
        let (primary, sent) = Primary::that_does(other, &[Act::Large, Act::Insert], pos);
        let own = Some(pos);
        Feed { name, primary, passthrough, start, sent, keeps, is_same_line: false, own }
    }

    /// The same, of which `lost+found` has something of that name already.
    fn former_again(name: &'static str, mode: Mode) -> Feed {
        let mut feed = Feed::former(name, mode, true, &[Act::Insert, Act::Vacuum, Act::Insert]);
        let ltx = Path::new("data/dbs/db/ltx");
        let names = feed.start.names_in(ltx);
        let (same, other) = (&names[names.len() - 1], &names[names.len() - 2]);
        let content = |name: &Path| feed.start.content(name.to_str().unwrap()).unwrap().to_vec();
        let (of_same, mut of_other) = (content(same), content(other));
        *of_other.last_mut().unwrap() ^= 1;
        let lost =
            |name: &Path| Path::new("data/dbs/db/lost+found").join(name.file_name().unwrap());
        feed.start.add(&lost(same), of_same);
        feed.start.add(&lost(other), of_other.clone());
        feed.keeps.push(of_other);
        feed
    }

    /// A node that cannot tell what its files are.
    fn damaged(name: &'static str, mode: Mode) -> Feed {
        let mut feed = Feed::former(name, mode, true, &[Act::Insert, Act::Retain]);
        let ltx = feed.start.names_in(Path::new("data/dbs/db/ltx"));
        feed.start.add(ltx.last().unwrap(), b"torn".to_vec());
        let database = Path::new("data/dbs/db/database");
        let mut content = feed.start.content("data/dbs/db/database").unwrap().to_vec();
        content.fill(b'x');
        feed.start.add(database, content.clone());
        feed.start.add(Path::new("data/dbs/db/wal"), vec![b'x'; 5000]);
        feed.own = None;
        feed.keeps = vec![content, b"torn".to_vec()];
        feed.sent = Vec::new();
        let db = feed.primary.engine.database(DB).unwrap();
        feed.sent.extend(super::script::next_for(&db, ltx::Pos::ZERO));
        feed
    }

    /// Nothing is lost that nobody else has.
    fn check_kept(&self, root: &Path) -> Result<(), String> {
        let found: Vec<_> = contents(root).into_values().collect();
        for keep in &self.keeps {
            if !found.contains(keep) {
                return Err(format!("{} bytes are gone that must be kept", keep.len()));
            }
        }
        let Some(own) = self.own else { return Ok(()) };
        // One that could not be opened is kept as it was.
        let database = self.start.content("data/dbs/db/database");
        if found.iter().any(|file| Some(&file[..]) == database) {
            return Ok(());
        }
        // Either all files from the beginning, or the state.
        let is_whole = |file: &&Vec<u8>| match ltx::verify(&file[..]) {
            Ok((header, trailer)) => {
                let pos = ltx::Pos { txid: header.max_txid, checksum: trailer.post_apply };
                header.is_snapshot() && (pos == own || header.max_txid == ltx::Txid(1))
            }
            Err(_) => false,
        };
        match found.iter().any(|file| is_whole(&file)) {
            true => Ok(()),
            false => Err(format!("nothing leads to {own}")),
        }
    }
}

/// The LTX files of a node by their names.
fn ltx_files(root: &Path) -> BTreeMap<std::path::PathBuf, Vec<u8>> {
    contents(&image::directory(&data(root), DB).ltx())
}

impl Primary {
    /// A node that does something, and what it sends to a replica that was at `at`.
    fn that_does(mut world: World, acts: &[Act], mut at: ltx::Pos) -> (Primary, Vec<Vec<u8>>) {
        // A new replica gets everything piece by piece.
        let is_new = at.is_zero();
        let mut sent = Vec::new();
        let mut send = |world: &World| {
            let db = world.db().unwrap();
            while let Some(bytes) = super::script::next_for(&db, at) {
                let (header, trailer) = ltx::verify(&bytes[..]).unwrap();
                at = ltx::Pos { txid: header.max_txid, checksum: trailer.post_apply };
                sent.push(bytes);
            }
        };
        if is_new {
            send(&world);
        }
        for act in acts {
            world.act(*act).unwrap();
            if is_new {
                send(&world);
            }
        }
        send(&world);
        world.close().unwrap();
        let root = ram_dir();
        Disk::load(world.root.path()).store(root.path());
        let engine = open(root.path(), 1).unwrap();
        engine.set_role(Role::Primary);
        (Primary { engine, root }, sent)
    }
}

/// What a replica did.
struct Applied {
    calls: Vec<Called>,
    reads: Vec<Called>,
    start: Disk,
    steps: Vec<Step>,
}

/// A replica applies what it is sent, and a call is hit meanwhile. It stays a replica that can follow:
/// in the same process if it is `patient`, after a crash, and after a stop.
fn apply(feed: &Feed, plan: Option<Plan>, patient: bool, hits: &Hits) -> Result<Applied, String> {
    let Feed { primary, passthrough, .. } = feed;
    let root = ram_dir();
    feed.start.store(root.path());
    let (recorder, watching) = Recorder::start(root.path(), plan.clone());
    let what = |error: String| {
        format!(
            "{}, passthrough {passthrough} {plan:?} at {:?}: {error}",
            feed.name,
            recorder.hit()
        )
    };
    let rejoin = |root: &Path| rejoin(primary, root).and_then(|()| feed.check_kept(root));
    let primary_db = primary.engine.database(DB).unwrap();
    if let Ok(engine) = replica(root.path(), *passthrough) {
        engine.shared().set_same_line(feed.is_same_line);
        for bytes in &feed.sent {
            let Ok(target) = receive(&engine, bytes) else { break };
            let db = engine.database(DB).unwrap();
            wait::until_true("an outcome", || {
                let is_stuck = db.received_pos().is_zero() || db.state() != DbState::Ready;
                // One that is lost is so from the beginning.
                let is_told = feed.own.is_some() || feed.keeps.is_empty();
                let is_over = is_told || recorder.hit().is_some();
                db.pos() == target || (is_over && is_stuck)
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
        // What is hit may be its end, too.
        if recorder.hit().is_some() {
            recorder.calm();
        }
        let went_on = match patient && recorder.hit().is_some() {
            true => follow_up(&primary_db, primary.root.path(), &engine, root.path()),
            false => Ok(()),
        };
        let closed = engine.close();
        went_on.map_err(|error| what(format!("tried again: {error}")))?;
        if plan.is_none() {
            closed.map_err(|error| what(litefs::engine::chain_text(&error)))?;
        }
        rejoin(crashed.path()).map_err(|error| what(format!("after a crash: {error}")))?;
    }
    recorder.calm();
    drop(watching);
    let (calls, steps) = (recorder.calls(), recorder.steps());
    rejoin(root.path()).map_err(|error| what(format!("after a stop: {error}")))?;
    if let Some(hit) = recorder.hit() {
        hits.note(Some(&hit));
        let mut chance = Chance(hit.step as u64 + 1);
        let end = hit.step + chance.below((steps.len() - hit.step) as u64 + 1) as usize;
        let (loss, lost) = (Loss::nth(chance.below(20) as usize), ram_dir());
        Disk::after_power_loss(&recorder.base, &steps, end, loss, &mut chance).store(lost.path());
        hits.losses.fetch_add(1, Ordering::Relaxed);
        rejoin(lost.path()).map_err(|error| {
            let Hit { step, .. } = hit;
            what(format!("hit at step {step}, without power after {end} {loss:?}: {error}"))
        })?;
    }
    let reads = recorder.reads();
    Ok(Applied { calls, reads, start: recorder.base.clone(), steps })
}

/// What the replicas come to.
pub fn reached() -> Vec<Called> {
    let hits = Hits::default();
    let (feeds, found) = (all_feeds(), Mutex::new(Vec::new()));
    let failures = each(&feeds, |feed| {
        let calm = apply(feed, None, false, &hits)?;
        found.lock().unwrap().extend(calm.calls.into_iter().chain(calm.reads));
        Ok(())
    });
    report("a replica without trouble", &failures);
    found.into_inner().unwrap()
}

/// A replica on what stands in `root` follows again, and becomes equal.
fn rejoin(primary: &Primary, root: &Path) -> Result<(), String> {
    let replica = replica(root, true).map_err(|error| litefs::engine::chain_text(&error))?;
    let db = primary.engine.database(DB).unwrap();
    let result = follow_up(&db, primary.root.path(), &replica, root);
    let closed = replica.close().map_err(|error| litefs::engine::chain_text(&error));
    result.and(closed)
}

/// What replicas are sent in these tests.
pub fn feeds() -> Vec<Feed> {
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
        Script { name, mode, finds: Finds::Born, acts: acts.to_vec() }
    };
    let wal = of("replica, wal", "wal", &acts);
    let journal = of("replica, delete", "delete", &[Insert, Large, Shrink, Import, Insert]);
    vec![Feed::new(&wal, true), Feed::new(&wal, false), Feed::new(&journal, true)]
}

/// Replicas that have what their primary has not.
pub fn former_feeds() -> Vec<Feed> {
    use Act::*;
    let (wal, delete) = (Mode::new("wal", "full", true), Mode::new("delete", "full", true));
    let own = [Insert, Vacuum, Insert];
    vec![
        Feed::former("former, wal", wal, true, &own),
        Feed::former("former, wal", wal, false, &own),
        Feed::former("former, delete", delete, true, &own),
        Feed {
            is_same_line: true,
            ..Feed::former("former, of the same line", delete, true, &[Insert])
        },
        Feed::former("former, without its beginning", delete, true, &[Insert, Insert, Retain]),
        Feed::former_again("former, again", wal),
        Feed::damaged("damaged", delete),
    ]
}

/// Those that are chosen.
fn all_feeds() -> Vec<Feed> {
    let mut all = feeds();
    all.extend(former_feeds());
    chosen_names(all, |feed| feed.name)
}

pub fn first_of(missed: Vec<&Called>) -> Vec<Plan> {
    let errors = missed.into_iter().map(|called| called.first().with(IO_ERROR));
    errors.collect()
}

#[test]
fn every_call_of_a_replica_may_fail() {
    let mut chance = Chance(seed());
    let (hits, mut sample) = (Hits::default(), Sample::default());
    let (mut failures, mut calls) = (Vec::new(), Vec::new());
    for feed in all_feeds() {
        let calm = apply(&feed, None, false, &hits).unwrap();
        let mut plans = picks(&calm.calls, &mut chance);
        plans.retain(|plan| sample.takes(&plan.label, 3, &mut chance));
        let cases: Vec<(Plan, bool)> =
            plans.into_iter().map(|plan| (plan, chance.below(4) == 0)).collect();
        let run = |(plan, patient): &(Plan, bool)| {
            apply(&feed, Some(plan.clone()), *patient, &hits).map(drop)
        };
        failures.extend(each(&cases, run));
        failures
            .extend(each(&first_of(hits.missed(&calm.calls)), |plan| run(&(plan.clone(), false))));
        calls.push(calm.calls);
    }
    report("a call of a replica that fails", &failures);
    hits.report(&calls.iter().map(Vec::as_slice).collect::<Vec<_>>());
}

/// A read that fails, is interrupted, or ends early: two calls of each label, or all.
fn reads<'a>(calls: &[(&'a Calm, &'a Called)], chance: &mut Chance) -> Vec<(&'a Calm, Plan)> {
    let only = env::var("LITEFS_TEST_LABEL").unwrap_or_default();
    let mut by_label: BTreeMap<&str, Vec<&(&Calm, &Called)>> = BTreeMap::new();
    for call in calls.iter().filter(|(_, called)| called.label.starts_with(&only)) {
        by_label.entry(&call.1.label).or_default().push(call);
    }
    let mut plans = Vec::new();
    for calls in by_label.values() {
        if is_whole() {
            plans.extend(calls.iter().map(|(calm, called)| (*calm, called.with(IO_ERROR))));
            continue;
        }
        for trouble in [IO_ERROR, IO_ERROR, *chance_of(&HARMLESS, chance)] {
            let (calm, called) = chance_of(calls, chance);
            plans.push((*calm, called.with(trouble)));
        }
    }
    plans
}

pub const IO_ERROR: Trouble = Trouble::Errno(libc::EIO);
const HARMLESS: [Trouble; 2] = [Trouble::Short, Trouble::Errno(libc::EINTR)];

fn chance_of<'a, T>(items: &'a [T], chance: &mut Chance) -> &'a T {
    &items[chance.below(items.len() as u64) as usize]
}

#[test]
fn every_read_may_fail() {
    let mut chance = Chance(seed());
    let calms = calms();
    let all = calms.iter().flat_map(|calm| calm.reads.iter().map(move |called| (calm, called)));
    let all: Vec<(&Calm, &Called)> = all.collect();
    let mut cases = Vec::new();
    for (calm, plan) in reads(&all, &mut chance) {
        let (patient, replicates, dies) = (false, chance.below(4) == 0, chance.below(4) == 0);
        cases.push(Case { calm, plan, patient, replicates, dies, seed: chance.next() });
    }
    let hits = Hits::default();
    let mut failures = each(&cases, |case| case.run(&hits));
    failures.extend(run_missed(calms, |calm| &calm.reads, &hits));
    report("a read that fails", &failures);
    hits.report(&calms.iter().map(|calm| &calm.reads[..]).collect::<Vec<_>>());
}

#[test]
fn every_read_of_a_replica_may_fail() {
    let mut chance = Chance(seed());
    let (hits, mut sample) = (Hits::default(), Sample::default());
    let (mut failures, mut all) = (Vec::new(), Vec::new());
    for feed in all_feeds() {
        let calm = apply(&feed, None, false, &hits).unwrap();
        let mut by_label: BTreeMap<&str, Vec<&Called>> = BTreeMap::new();
        calm.reads.iter().for_each(|read| by_label.entry(&read.label).or_default().push(read));
        let one_of = |calls: &Vec<&Called>| match is_whole() {
            true => calls.iter().map(|called| called.with(IO_ERROR)).collect(),
            false => vec![chance_of(calls, &mut chance).with(IO_ERROR)],
        };
        let mut plans: Vec<Plan> = by_label.values().flat_map(one_of).collect();
        plans.retain(|plan| sample.takes(&plan.label, 3, &mut Chance(1)));
        let run = |plan: &Plan| apply(&feed, Some(plan.clone()), false, &hits).map(drop);
        failures.extend(each(&plans, run));
        failures.extend(each(&first_of(hits.missed(&calm.reads)), run));
        all.push(calm.reads);
    }
    report("a read of a replica that fails", &failures);
    hits.report(&all.iter().map(Vec::as_slice).collect::<Vec<_>>());
}

/// Its numbers begin anew: LTX files of the former chain that came back would have higher ones.
#[test]
fn an_import_in_the_place_of_a_failed_database_survives_the_files_that_it_replaced() {
    let mode = Mode::new("delete", "full", true);
    let base = base(mode);
    let plan = Plan { label: "read:found".to_owned(), nth: 0, trouble: IO_ERROR };
    let mut world = started(World::start(mode, &base.disk, base.effects.clone(), Some(plan)));
    world.act(Act::Import).unwrap();
    let steps = world.recorder.steps();
    for seed in 1..=20 {
        let loss = Loss { content: Content::Lost, names: Names::InOrder };
        let (base_disk, lost) = (&world.recorder.base, ram_dir());
        Disk::after_power_loss(base_disk, &steps, steps.len(), loss, &mut Chance(seed))
            .store(lost.path());
        let rows = restart(lost.path()).unwrap().rows;
        assert_eq!(rows, BTreeSet::from([base.effects.len()]), "seed {seed}");
    }
}

/// SQLite syncs the directory after a new journal or WAL, and goes on if that fails.
#[test]
fn a_commit_whose_log_has_no_durable_name_is_refused() {
    for mode in [Mode::new("wal", "full", true), Mode::new("delete", "full", true)] {
        let base = base(mode);
        let mut world = started(World::start(mode, &base.disk, base.effects.clone(), None));
        fault::arm_here(Fault { label: "files:dir".to_owned(), after: 0, errno: libc::EIO });
        assert!(world.act(Act::Insert).is_err(), "{mode:?}");
        assert!(!fault::disarm_here());
        world.act(Act::Insert).unwrap();
        let steps = world.recorder.steps();
        let loss = Loss { content: Content::Lost, names: Names::Lost };
        let lost = ram_dir();
        Disk::after_power_loss(&world.recorder.base, &steps, steps.len(), loss, &mut Chance(1))
            .store(lost.path());
        let rows = restart(lost.path()).unwrap().rows;
        assert!(rows.contains(&(base.effects.len() + 1)), "{mode:?}: {rows:?}");
    }
}

/// The index and the WAL change one after the other.
#[test]
fn a_wal_that_could_not_be_emptied_is_emptied_later() {
    let hits = Hits::default();
    let feed = feeds().remove(0);
    let calm = apply(&feed, None, false, &hits).unwrap();
    let is_its = |called: &&Called| called.label == "apply:wal" || called.label == "apply:index";
    let calls: Vec<&Called> = calm.calls.iter().filter(is_its).collect();
    assert!(calls.len() > 5, "{calls:?}");
    // As many as fit into a second; the rest have their turn above.
    let failures = each(&calls, |call| {
        let plan = Some(call.with(Trouble::Errno(libc::EIO)));
        apply(&feed, plan, true, &hits).map(drop)
    });
    report("an empty wal", &failures);
}

#[test]
fn every_moment_of_a_replica_may_be_the_last() {
    let mut chance = Chance(seed());
    let (mut failures, mut moments, mut tried) = (Vec::new(), 0, 0);
    for feed in all_feeds() {
        let hits = Hits::default();
        let Applied { start, steps, .. } = apply(&feed, None, false, &hits).unwrap();
        let sample = if feed.own.is_some() { 15 } else { 45 };
        let by = stride(steps.len(), sample);
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
            let what = |error| format!("{} after step {end} {loss:?} {seed}: {error}", feed.name);
            let (looked_at, crashed) = (ram_dir(), ram_dir());
            disk.store(looked_at.path());
            disk.store(crashed.path());
            let restarted = restart(looked_at.path());
            if feed.name != "damaged" {
                restarted.map_err(what)?;
            }
            let rejoined = rejoin(&feed.primary, crashed.path());
            rejoined.and_then(|()| feed.check_kept(crashed.path())).map_err(what)
        }));
    }
    println!("{moments} moments, {tried} images");
    report("a replica that dies", &failures);
}

/// A WAL that is moved into the database file under all locks may be lost but for its beginning, which
/// must not look like something new on top of that.
#[test]
fn the_beginning_of_a_wal_is_not_taken_for_its_end() {
    let feed = feeds().remove(0);
    let hits = Hits::default();
    let Applied { start, steps, .. } = apply(&feed, None, false, &hits).unwrap();
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
