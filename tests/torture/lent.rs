//! A client writes on a replica that has borrowed the database; the calls of either node fail, or are the
//! last ones. What the client was told stands on the primary, and then on both.

use std::io::Read as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use litefs::engine::db::{Answer, Refusal};
use litefs::engine::halt::{Forward, HaltId, Outgoing};
use litefs::engine::{Db, Engine, LtxBytes, Role, chain_text};
use litefs::os::fault::Watching;

use super::client::Pages;
use super::disk::{Called, Disk, Hit, Loss, Plan, Recorder, Step, Trouble};
use super::faults::{Hits, Sample, base, chosen_names, first_of, picks, report};
use super::script::{
    Act, DB, Known, Mode, World, come_after, data, follow_up, next_for, open, receive,
    receive_forwarded, replica, restart,
};
use super::{each, is_whole, ram_dir, seed};
use crate::support::chance::Chance;
use crate::support::image::{self, Image};
use crate::support::wait;

const ID: HaltId = HaltId(7);

/// The primary, as the node that borrows knows it.
pub struct Lender {
    engine: Arc<Engine>,
    /// Who records what happens to the primary, if somebody does.
    recorder: Option<Arc<Recorder>>,
}

/// The way of a transaction to the primary, without a network.
struct Way(Arc<Engine>);

impl Forward for Way {
    fn acquire(&self, _db: Arc<Db>, _id: HaltId, answer: Answer) {
        answer(Err(Refusal::Os(libc::EIO)));
    }

    fn cancel(&self, _id: HaltId) -> bool {
        false
    }

    fn release(&self, _db: Arc<Db>, _id: HaltId, answer: Answer) {
        answer(Ok(()));
    }

    fn commit(&self, _db: Arc<Db>, outgoing: Outgoing, answer: Answer) {
        let primary = self.0.clone();
        thread::spawn(move || {
            answer(take(&primary, outgoing).map_err(|()| Refusal::Os(libc::EIO)))
        });
    }
}

/// The primary takes a transaction, and it is durable there.
fn take(primary: &Engine, outgoing: Outgoing) -> Result<(), ()> {
    let bytes = match outgoing.ltx {
        LtxBytes::Memory(bytes) => bytes.to_vec(),
        LtxBytes::File(file, len) => {
            let mut bytes = Vec::new();
            let from = litefs::os::FileCursor::new("read:forwarded", file);
            from.take(len).read_to_end(&mut bytes).map_err(drop)?;
            bytes
        }
    };
    let taken = receive_forwarded(primary, &bytes, outgoing.id).map_err(drop)?;
    assert_eq!(taken, outgoing.pos);
    let (sender, durable) = mpsc::channel();
    let db = primary.database(DB).unwrap();
    db.when_durable(taken.txid, Box::new(move |result| sender.send(result.is_ok()).unwrap()));
    match durable.recv_timeout(Duration::from_secs(60)).expect("an answer") {
        true => Ok(()),
        false => Err(()),
    }
}

impl World {
    /// Gets the HALT lock.
    pub fn borrow(&mut self) -> Result<(), String> {
        let lender = self.lender.as_ref().expect("a primary");
        let primary = lender.engine.database(DB).ok_or("no database")?;
        let db = self.db().ok_or("no database")?;
        let text = |error| chain_text(&error);
        db.expect_borrow().map_err(text)?;
        let limit = Duration::from_secs(5);
        let loan = primary.lend(ID, limit, &AtomicBool::new(false)).map_err(text)?.loan();
        self.catch_up();
        db.begin_borrow(ID, loan.pos, loan.until).map_err(text)
    }

    /// Gives it back.
    pub fn give_back(&mut self) {
        self.disconnect();
        let lender = self.lender.as_ref().expect("a primary");
        if let Some(db) = self.db() {
            db.end_borrow(Some(ID));
            db.wait_settled();
        }
        if let Some(primary) = lender.engine.database(DB) {
            primary.take_back(Some(ID), "released");
        }
    }

    /// What the primary has comes in its stream.
    pub fn catch_up(&self) {
        let Some(lender) = &self.lender else { return };
        let is_harmed = || {
            let other = lender.recorder.as_ref().is_some_and(|recorder| recorder.is_harmed());
            self.recorder.is_harmed() || other
        };
        let begin = Instant::now();
        loop {
            let (Some(primary), Some(copy)) = (lender.engine.database(DB), self.db()) else {
                return;
            };
            if copy.pos() == primary.pos() {
                break;
            }
            let at = copy.received_pos();
            if at != primary.pos()
                && let Some(bytes) = next_for(&primary, at)
            {
                let _ = receive(&self.engine, &bytes);
            }
            let limit = if is_harmed() { Duration::from_millis(100) } else { wait::DEADLINE };
            if begin.elapsed() > limit {
                return;
            }
            thread::park_timeout(Duration::from_millis(1));
        }
    }

    /// The lock is renewed, which ends after a while.
    pub fn renew(&self) {
        let Some(lender) = &self.lender else { return };
        let (Some(primary), Some(copy)) = (lender.engine.database(DB), self.db()) else { return };
        if copy.borrowed_until(ID).is_some() && primary.loan(ID).is_some() {
            let lent = primary.lend(ID, Duration::ZERO, &AtomicBool::new(false));
            lent.into_iter().for_each(|lent| copy.extend_borrow(ID, lent.loan().until));
        }
    }

    /// What the client does, as the recorder of the primary sees it.
    pub fn note_to_lender(&self, step: Step) {
        if let Some(recorder) = self.lender.as_ref().and_then(|lender| lender.recorder.as_ref()) {
            recorder.note(step);
        }
    }
}

/// Whose calls are hit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Primary,
    Replica,
}

/// What a client does under the lock.
struct Lent {
    name: &'static str,
    mode: Mode,
    acts: Vec<Act>,
    /// What both nodes begin with.
    primary: Disk,
    replica: Disk,
    before: Vec<super::script::Effect>,
}

fn lents() -> Vec<Lent> {
    use Act::*;
    let acts =
        [Borrow, Insert, Large, RolledBack, Insert, GiveBack, Borrow, Insert, Shrink, GiveBack];
    let lent = |name, mode: Mode, acts: &[Act]| {
        let base = base(mode);
        let (root, copy) = (ram_dir(), ram_dir());
        base.disk.store(root.path());
        let engine = open(root.path(), 1).unwrap();
        engine.set_role(Role::Primary);
        let follower = replica(copy.path(), mode.passthrough).unwrap();
        follow_up(&engine.database(DB).unwrap(), root.path(), &follower, copy.path()).unwrap();
        follower.close().unwrap();
        engine.close().unwrap();
        let (primary, replica) = (Disk::load(root.path()), Disk::load(copy.path()));
        Lent { name, mode, acts: acts.to_vec(), primary, replica, before: base.effects }
    };
    let all = vec![
        lent("lent, wal", Mode::new("wal", "full", true), &acts),
        lent("lent, wal without passthrough", Mode::new("wal", "full", false), &acts),
        lent("lent, delete", Mode::new("delete", "full", true), &acts),
    ];
    chosen_names(all, |lent| lent.name)
}

/// What was called on the side that is watched.
struct Calls {
    calls: Vec<Called>,
    reads: Vec<Called>,
    steps: Vec<Step>,
    start: Disk,
}

impl Lent {
    /// Both nodes, and what the client was told.
    fn play(&self, side: Side, plan: Option<Plan>, hits: &Hits) -> Result<Calls, String> {
        let (root, copy) = (ram_dir(), ram_dir());
        self.primary.store(root.path());
        self.replica.store(copy.path());
        let plans = match side {
            Side::Primary => [plan.clone(), None],
            Side::Replica => [None, plan.clone()],
        };
        let [of_primary, of_replica] = plans;
        let (recorder, watching) = Recorder::start(root.path(), of_primary);
        let (other, other_watching) = Recorder::start(copy.path(), of_replica);
        let watched = match side {
            Side::Primary => recorder.clone(),
            Side::Replica => other.clone(),
        };
        let what = |error: String| {
            format!("{}, {side:?} {plan:?} at {:?}: {error}", self.name, watched.hit())
        };
        let told = self.run(&root, copy, [recorder.clone(), other], other_watching);
        drop(watching);
        let (told, world, primary) = match told {
            Ok(run) => run,
            Err(_) if plan.is_some() => {
                // It did not start; nothing was begun.
                hits.note(watched.hit().as_ref());
                return Err("NOT STARTED".to_owned());
            }
            Err(error) => return Err(what(error)),
        };
        let harmless =
            |plan: &Plan| matches!(plan.trouble, Trouble::Errno(libc::EINTR) | Trouble::Short);
        if plan.as_ref().is_none_or(harmless) && !told.is_empty() {
            return Err(what(format!("told {told:?}")));
        }
        hits.note(watched.hit().as_ref());
        let steps = recorder.steps();
        let known = Known::at(&world.effects, self.before.len(), &steps);
        let calls = Calls {
            calls: watched.calls(),
            reads: watched.reads(),
            steps: watched.steps(),
            start: watched.base.clone(),
        };
        self.check(side, &known, (&recorder, &watched), (world, primary, root), hits)
            .map_err(|error| what(format!("{error}; told {told:?}")))?;
        Ok(calls)
    }

    fn run(
        &self,
        root: &tempfile::TempDir,
        copy: tempfile::TempDir,
        [recorder, other]: [Arc<Recorder>; 2],
        watching: Watching,
    ) -> Result<(Vec<String>, World, Arc<Engine>), String> {
        let text = |error| chain_text(&error);
        let primary = open(root.path(), 1).map_err(text)?;
        primary.mounted(Arc::new(Pages), self.mode.passthrough);
        primary.set_role(Role::Primary);
        let engine = replica(copy.path(), self.mode.passthrough);
        let engine = engine.map_err(|error| {
            let _ = primary.close();
            text(error)
        })?;
        engine.shared().set_forward(Arc::new(Way(primary.clone())));
        let mut world = World::with(copy, other, Some(watching), engine, self.mode);
        world.effects = self.before.clone();
        world.lender = Some(Lender { engine: primary.clone(), recorder: Some(recorder) });
        world.connect();
        world.catch_up();
        let mut told = Vec::new();
        for act in &self.acts {
            if let Err(error) = world.act(*act) {
                told.push(format!("{act:?}: {error}"));
            }
        }
        Ok((told, world, primary))
    }

    /// Each node may have died in the end, the one that was hit also before.
    fn check(
        &self,
        side: Side,
        known: &Known,
        (recorder, watched): (&Recorder, &Recorder),
        (mut world, primary, root): (World, Arc<Engine>, tempfile::TempDir),
        hits: &Hits,
    ) -> Result<(), String> {
        let steps = watched.steps();
        let all = recorder.steps();
        let dead = ram_dir();
        Disk::after_crash(&recorder.base, &all, all.len()).store(dead.path());
        recorder.calm();
        watched.calm();
        world.give_back();
        let primary_db = primary.database(DB).ok_or("the primary has no database")?;
        let alive = match watched.hit() {
            // The replica goes on in the same process, or after a restart.
            // One that could not be opened stays so until the next start.
            Some(hit) if steps.len() % 2 == 0 && !primary_db.received_pos().is_zero() => {
                wait::until_or(
                    || format!("the primary to be mended: {:?}", primary_db.state()),
                    || (primary_db.state() == litefs::engine::DbState::Ready).then_some(()),
                );
                let (engine, copy) = (world.engine.clone(), world.root.path().to_owned());
                let has_index = self.mode.passthrough || hit.label == "apply:shm";
                match self.mode.is_wal() && has_index {
                    // Only the wal-index tells which frames of a refused commit do not count; where that
                    // could not be written, they are taken back with the next one.
                    true => come_after(&primary_db, &engine).and_then(|()| {
                        let image = Image::of_files(&image::directory(&data(&copy), DB));
                        let (have, pos) = (image.map(|image| image.checksum()), primary_db.pos());
                        match have == Some(pos.checksum) {
                            true => Ok(()),
                            false => Err(format!("the replica has {have:?} at {pos}")),
                        }
                    }),
                    false => {
                        // A node rolls back what nobody ends when it finds that.
                        let end = Instant::now() + wait::DEADLINE;
                        loop {
                            let equal = follow_up(&primary_db, root.path(), &engine, &copy);
                            if equal.is_ok() || Instant::now() > end {
                                break equal;
                            }
                            thread::park_timeout(Duration::from_millis(2));
                        }
                    }
                }
            }
            _ => Ok(()),
        };
        let closed = world.close();
        let ended = primary.close();
        alive.map_err(|error| format!("tried again: {error}"))?;
        if watched.hit().is_none() {
            closed?;
            ended.map_err(|error| chain_text(&error))?;
        }
        if std::env::var_os("LITEFS_TEST_DUMP").is_some() {
            super::power::dump(&all);
        }
        let rows = restart(dead.path()).map_err(|error| format!("a dead primary: {error}"))?.rows;
        known.allows(&rows).map_err(|error| format!("a dead primary: {error}"))?;
        let rows = restart(root.path()).map_err(|error| format!("the primary: {error}"))?.rows;
        known.allows(&rows).map_err(|error| format!("the primary: {error}"))?;
        let Some(Hit { step, calls, .. }) = watched.hit() else { return Ok(()) };
        let step = step.min(steps.len());
        let mut chance = Chance(step as u64 + 1);
        let moment = step + chance.below((steps.len() - step) as u64 + 1) as usize;
        let images = [
            (watched.steps_before(calls).min(steps.len()), None),
            (watched.steps_before(calls + 5).min(steps.len()), None),
            (moment, Some(Loss::nth(chance.below(20) as usize))),
        ];
        for (end, loss) in images {
            let died = ram_dir();
            let disk = match loss {
                None => Disk::after_crash(&watched.base, &steps, end),
                Some(loss) => Disk::after_power_loss(&watched.base, &steps, end, loss, &mut chance),
            };
            disk.store(died.path());
            let counter = if loss.is_none() { &hits.deaths } else { &hits.losses };
            counter.fetch_add(1, Ordering::Relaxed);
            let checked = match side {
                Side::Primary => restart(died.path()).and_then(|restarted| {
                    Known::at(&world.effects, self.before.len(), &steps[..end])
                        .allows(&restarted.rows)
                }),
                Side::Replica => rejoin(root.path(), died.path()),
            };
            checked.map_err(|error| format!("{side:?} dead at step {end} {loss:?}: {error}"))?;
        }
        Ok(())
    }
}

/// A replica that died follows a primary again.
fn rejoin(primary_root: &std::path::Path, root: &std::path::Path) -> Result<(), String> {
    let copy = ram_dir();
    Disk::load(primary_root).store(copy.path());
    let text = |error| chain_text(&error);
    let primary = open(copy.path(), 1).map_err(text)?;
    primary.set_role(Role::Primary);
    let engine = replica(root, true).map_err(text)?;
    let result = follow_up(&primary.database(DB).unwrap(), copy.path(), &engine, root);
    let closed = engine.close().map_err(text);
    primary.close().map_err(text)?;
    result.and(closed)
}

/// The labels that a lent database comes to.
pub fn reached() -> Vec<Called> {
    let (hits, found) = (Hits::default(), Mutex::new(Vec::new()));
    let lents = lents();
    let both = [Side::Primary, Side::Replica];
    let cases: Vec<_> = lents.iter().flat_map(|lent| both.map(|side| (lent, side))).collect();
    let failures = each(&cases, |(lent, side)| {
        let Calls { calls, reads, .. } = lent.play(*side, None, &hits)?;
        found.lock().unwrap().extend(calls.into_iter().chain(reads));
        Ok(())
    });
    report("a lent database without trouble", &failures);
    found.into_inner().unwrap()
}

#[test]
fn every_call_under_a_halt_lock_may_fail() {
    let mut chance = Chance(seed());
    let (hits, mut sample) = (Hits::default(), Sample::default());
    let (mut failures, mut all) = (Vec::new(), Vec::new());
    for lent in lents() {
        for side in [Side::Primary, Side::Replica] {
            let Calls { calls, reads, .. } = lent.play(side, None, &hits).unwrap();
            let mut plans = picks(&calls, &mut chance);
            plans.extend(picks(&reads, &mut chance));
            plans.retain(|plan| sample.takes(&plan.label, 1, &mut chance));
            let run = |plan: &Plan| match lent.play(side, Some(plan.clone()), &hits) {
                Err(error) if error == "NOT STARTED" => Ok(()),
                played => played.map(drop),
            };
            failures.extend(each(&plans, run));
            failures.extend(each(&first_of(hits.missed(&calls)), run));
            failures.extend(each(&first_of(hits.missed(&reads)), run));
            all.push(calls);
            all.push(reads);
        }
    }
    report("a call under a halt lock", &failures);
    hits.report(&all.iter().map(Vec::as_slice).collect::<Vec<_>>());
}

#[test]
fn either_node_may_die_at_any_moment_under_a_halt_lock() {
    let mut chance = Chance(seed());
    let hits = Hits::default();
    let (mut failures, mut tried) = (Vec::new(), 0);
    for lent in lents() {
        let played = lent.play(Side::Primary, None, &hits).unwrap();
        let effects = lent.effects();
        let moments = if is_whole() { played.steps.len() } else { 12 };
        let by = (played.steps.len() / moments).max(1);
        let ends: Vec<_> =
            (chance.below(by as u64) as usize..=played.steps.len()).step_by(by).collect();
        let cases: Vec<_> = ends.into_iter().map(|end| (end, chance.next())).collect();
        tried += cases.len();
        failures.extend(each(&cases, |&(end, seed)| {
            let (steps, mut chance) = (&played.steps, Chance(seed));
            let loss = (seed % 2 == 0).then(|| Loss::nth(chance.below(20) as usize));
            let disk = match loss {
                None => Disk::after_crash(&played.start, steps, end),
                Some(loss) => Disk::after_power_loss(&played.start, steps, end, loss, &mut chance),
            };
            let died = ram_dir();
            disk.store(died.path());
            let known = Known::at(&effects, lent.before.len(), &steps[..end]);
            let rows = restart(died.path()).and_then(|restarted| known.allows(&restarted.rows));
            rows.map_err(|error| format!("{} after step {end} {loss:?}: {error}", lent.name))
        }));
    }
    println!("{tried} moments");
    report("a node that dies under a halt lock", &failures);
}

impl Lent {
    /// What the client begins altogether.
    fn effects(&self) -> Vec<super::script::Effect> {
        use super::script::Effect;
        let of = |act: &Act| match act {
            Act::Insert | Act::Large | Act::Shrink => Effect::Row,
            _ => Effect::Same,
        };
        self.before.iter().copied().chain(self.acts.iter().map(of)).collect()
    }
}
