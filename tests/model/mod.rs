//! Random scripts against a simple model: what applications, nodes and chance do to two databases,
//! on a primary with a replica, and the same changes in plain SQLite in memory.
//!
//! Each script has a seed; by default those from 1 on are played, as many as the time allows.
//! `LITEFS_TEST_SEED` plays that one, `LITEFS_TEST_STEPS` only these of its steps; `LITEFS_TEST_MINUTES`
//! plays new ones for so long. A script that fails is made shorter: steps are left out as long as it fails.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use play::Tally;
use script::{Setup, Step};

use crate::support::chance::Chance;

/// An application.
mod client;
/// A script on real nodes.
mod play;
/// Plain SQLite in memory.
mod reference;
/// What happens, by chance.
mod script;

/// How long scripts are begun.
const TIME: Duration = Duration::from_secs(24);
/// How long a script that fails is made shorter, in a run of so many minutes at the least.
const SHRINK_TIME: Duration = Duration::from_secs(60);
/// Steps of a script.
const STEPS: usize = 60;
/// Changes of which most are made, whatever the scripts; a few could all meet a lock.
const ENOUGH: u32 = 100;

/// All that happens under a seed.
struct Script {
    setup: Setup,
    steps: Vec<Step>,
}

impl Script {
    fn new(seed: u64) -> Script {
        let mut chance = Chance(seed);
        let setup = script::setup(&mut chance);
        Script { setup, steps: script::steps(&mut chance, STEPS) }
    }

    /// Plays these steps: what came of their changes, or what went wrong.
    fn play(&self, kept: &[usize]) -> Result<Tally, String> {
        let steps: Vec<(usize, &Step)> = kept.iter().map(|&at| (at, &self.steps[at])).collect();
        let played = catch_unwind(AssertUnwindSafe(|| play::play(self.setup, &steps)));
        played.map_err(|panic| words(&*panic))
    }

    /// Leaves steps out as long as the script fails, in one of three plays: who is killed in the middle
    /// of something is killed at another moment each time. Which are left, and how it fails then.
    fn shrink(
        &self,
        mut kept: Vec<usize>,
        mut failure: String,
        time: Duration,
    ) -> (Vec<usize>, String) {
        let end = Instant::now() + time;
        let mut size = kept.len().div_ceil(2);
        let mut at = 0;
        while size > 0 && Instant::now() < end {
            if at >= kept.len() {
                (size, at) = (size / 2, 0);
                continue;
            }
            let rest = kept.iter().enumerate();
            let rest: Vec<usize> =
                rest.filter(|(n, _)| !(at..at + size).contains(n)).map(|(_, &step)| step).collect();
            match (0..3).find_map(|_| self.play(&rest).err()) {
                None => at += size,
                Some(other) => (kept, failure) = (rest, other),
            }
        }
        (kept, failure)
    }

    /// As a person reads it.
    fn tell(&self, kept: &[usize]) -> String {
        let lines = kept.iter().map(|&at| format!("{at:3} {}\n", self.steps[at]));
        format!("{:?}\n{}", self.setup, lines.collect::<String>())
    }
}

fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic").to_owned()
}

fn of_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

/// The steps that `LITEFS_TEST_STEPS` names.
fn chosen() -> Option<Vec<usize>> {
    let text = std::env::var("LITEFS_TEST_STEPS").ok()?;
    Some(text.split(',').map(|step| step.parse().expect("a number")).collect())
}

fn new_seed() -> u64 {
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    clock.as_millis() as u64 % 1_000_000_000
}

#[test]
fn random_scripts_do_what_plain_sqlite_does() {
    let given = of_environment("LITEFS_TEST_SEED");
    let minutes = of_environment("LITEFS_TEST_MINUTES");
    let first = given.unwrap_or_else(|| if minutes.is_some() { new_seed() } else { 1 });
    let time = minutes.map_or(TIME, |minutes| Duration::from_secs(60 * minutes));
    let end = Instant::now() + time;
    let (mut scripts, mut steps) = (0, 0);
    let mut tally = Tally::default();
    for seed in first.. {
        let script = Script::new(seed);
        println!("LITEFS_TEST_SEED={seed} {:?}", script.setup);
        let kept = chosen().unwrap_or_else(|| (0..script.steps.len()).collect());
        match script.play(&kept) {
            Ok(played) => {
                println!("{played:?}");
                tally.add(played);
            }
            Err(failure) => {
                println!("seed {seed}: {failure}");
                let (kept, failure) = script.shrink(kept, failure, time.max(SHRINK_TIME));
                let list: Vec<String> = kept.iter().map(usize::to_string).collect();
                panic!(
                    "LITEFS_TEST_SEED={seed} LITEFS_TEST_STEPS={}\n{}{failure}",
                    list.join(","),
                    script.tell(&kept)
                );
            }
        }
        (scripts, steps) = (scripts + 1, steps + kept.len());
        let is_only = given.is_some() && minutes.is_none();
        if is_only || Instant::now() >= end {
            break;
        }
    }
    println!("{scripts} scripts from seed {first} on, {steps} steps, {tally:?}");
    // The others are those that plain SQLite refuses too, or that the locks of an application keep out.
    let is_enough = tally.asked >= ENOUGH;
    assert!(!is_enough || tally.made * 2 >= tally.asked, "most changes are to be made: {tally:?}");
}
