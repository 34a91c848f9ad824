//! The start of a node on what a crash or a power loss has left, in which calls fail, and after each of
//! which the node dies again.

use super::disk::{Called, Disk, Loss, Plan, Step, Trouble};
use super::faults::{Calm, calms, report, started};
use super::power::Promise;
use super::script::{Known, NotStarted, World, restart};
use super::{each, is_whole, ram_dir, seed};

use std::sync::Mutex;

use crate::support::chance::Chance;

/// What a start finds.
struct Image<'a> {
    calm: &'a Calm,
    end: usize,
    loss: Option<Loss>,
    seed: u64,
}

impl Image<'_> {
    fn disk(&self) -> Disk {
        let (start, steps) = (&self.calm.start, &self.calm.steps);
        match self.loss {
            None => Disk::after_crash(start, steps, self.end),
            Some(loss) => {
                Disk::after_power_loss(start, steps, self.end, loss, &mut Chance(self.seed))
            }
        }
    }

    /// What is to be found in the end.
    fn check(&self, root: &std::path::Path) -> Result<(), String> {
        let steps = &self.calm.steps[..self.end];
        let known = Known::at(&self.calm.effects, self.calm.base.effects.len(), steps);
        let rows = restart(root)?.rows;
        match (self.loss, self.calm.script.mode.promise()) {
            (Some(_), Promise::Earlier) => known.allows_earlier(&rows),
            _ => known.allows(&rows),
        }
    }

    /// Starts on it without trouble: what is done, the calls for that, and those that read.
    fn start(&self, disk: &Disk) -> (Disk, Vec<Step>, [Vec<Called>; 2]) {
        let mut world = started(World::start(self.calm.script.mode, disk, Vec::new(), None));
        world.close().unwrap();
        (
            world.recorder.base.clone(),
            world.recorder.steps(),
            [world.recorder.calls(), world.recorder.reads()],
        )
    }

    fn run(&self) -> Result<(), String> {
        let mut chance = Chance(self.seed);
        let (disk, steps, [calls, reads]) = self.start(&self.disk());
        let tries = if is_whole() { 60 } else { 4 };
        for number in 0..tries {
            let what = |how: String, error: String| {
                let Image { calm, end, loss, seed } = self;
                format!("{} after step {end} {loss:?} {seed}, {how}: {error}", calm.script.name)
            };
            let (call, at) = (
                chance.below(calls.len() as u64) as usize,
                chance.below(steps.len() as u64 + 1) as usize,
            );
            let all = super::faults::TROUBLES.into_iter();
            let troubles: Vec<_> =
                all.filter(|trouble| trouble.concerns(calls[call].kind)).collect();
            let plan = calls[call].with(troubles[number % troubles.len()]);
            self.hit(&disk, plan.clone(), &mut chance)
                .map_err(|error| what(format!("{plan:?}"), error))?;
            // A start on nothing reads nothing.
            if number % 2 == 0 && !reads.is_empty() {
                let read = &reads[chance.below(reads.len() as u64) as usize];
                let plan = read.with(Trouble::Errno(libc::EIO));
                self.hit(&disk, plan.clone(), &mut chance)
                    .map_err(|error| what(format!("{plan:?}"), error))?;
            }
            let dies = ram_dir();
            Disk::after_crash(&disk, &steps, at).store(dies.path());
            self.check(dies.path()).map_err(|error| what(format!("dies at {at}"), error))?;
            if self.loss.is_some() {
                let (loss, dies) = (Loss::nth(number), ram_dir());
                Disk::after_power_loss(&disk, &steps, at, loss, &mut chance).store(dies.path());
                self.check(dies.path())
                    .map_err(|error| what(format!("without power at {at} {loss:?}"), error))?;
            }
        }
        Ok(())
    }

    /// A call fails; then nothing does, or the power does some moments later.
    fn hit(&self, disk: &Disk, plan: Plan, chance: &mut Chance) -> Result<(), String> {
        let mode = self.calm.script.mode;
        let (root, recorder, world) = match World::start(mode, disk, Vec::new(), Some(plan)) {
            Ok(mut world) => {
                world.recorder.calm();
                let _ = world.close();
                (world.root.path().to_owned(), world.recorder.clone(), Ok(world))
            }
            Err(NotStarted { root, recorder, .. }) => {
                recorder.calm();
                (root.path().to_owned(), recorder, Err(root))
            }
        };
        let steps = recorder.steps();
        self.check(&root)?;
        drop(world);
        let (Some(hit), Some(_)) = (recorder.hit(), self.loss) else { return Ok(()) };
        let end = hit.step + chance.below((steps.len() - hit.step) as u64 + 1) as usize;
        let (loss, lost) = (Loss::nth(chance.below(20) as usize), ram_dir());
        Disk::after_power_loss(disk, &steps, end, loss, chance).store(lost.path());
        self.check(lost.path()).map_err(|error| {
            format!("hit at step {}, without power after {end} {loss:?}: {error}", hit.step)
        })
    }
}

/// What the starts come to.
pub fn reached() -> Vec<Called> {
    let found = Mutex::new(Vec::new());
    let failures = each(&images(&mut Chance(seed())), |image| {
        let (_, _, calls) = image.start(&image.disk());
        found.lock().unwrap().extend(calls.into_iter().flatten());
        Ok(())
    });
    report("a start", &failures);
    found.into_inner().unwrap()
}

#[test]
fn every_call_of_a_start_may_fail_or_be_the_last() {
    let images = images(&mut Chance(seed()));
    let failures = each(&images, Image::run);
    println!("{} starts", images.len());
    report("a start", &failures);
}

fn images(chance: &mut Chance) -> Vec<Image<'static>> {
    let calms = calms();
    let of_each = if is_whole() { 40 } else { 2 };
    let mut images = Vec::new();
    for calm in calms {
        for _ in 0..of_each {
            let end = chance.below(calm.steps.len() as u64 + 1) as usize;
            let lossy = calm.script.mode.synchronous != "off" && images.len() % 3 != 0;
            let loss = lossy.then_some(Loss::nth(images.len()));
            images.push(Image { calm, end, loss, seed: chance.next() });
        }
    }
    images
}
