//! Drivers of SQLite and frameworks above them. Each has a script that works with a database on the
//! primary and prints what it then holds. On the replica it must print the same, and that a write
//! was refused.

use std::process::Command;

use test_case::test_matrix;

use super::{Pair, run, script};
use crate::support::node::Settings;

/// How a driver is called: program, script, and the settings that the script knows.
pub struct Driver {
    /// The interpreter.
    pub program: &'static str,
    /// Its file in `tests/apps/drivers`.
    pub script: &'static str,
    /// What stands last on its command line, each in a database of its own.
    pub settings: &'static [&'static str],
}

const PYTHON: Driver = Driver {
    program: "python3",
    script: "python.py",
    settings: &["default", "wal", "rails", "truncate"],
};
/// Debian's, which is where Debian's Django is.
const DJANGO: Driver =
    Driver { program: "/usr/bin/python3", script: "django_site.py", settings: &["delete", "wal"] };
const PHP: Driver = Driver { program: "php", script: "pdo.php", settings: &["delete", "wal"] };

#[test_matrix([PYTHON, DJANGO, PHP], ["auto", "off"])]
fn a_driver_works_on_the_primary_and_reads_on_the_replica(
    driver: Driver,
    passthrough: &'static str,
) {
    check(&driver, passthrough);
}

/// Plays a driver on a pair of nodes.
#[track_caller]
pub fn check(driver: &Driver, passthrough: &'static str) {
    let pair = Pair::new(&Settings { passthrough, ..Settings::default() });
    let call = |mode: &str, node: &crate::support::node::Node, setting: &str| {
        let mut command = Command::new(driver.program);
        command.arg(script("drivers").join(driver.script));
        run(command.arg(mode).arg(node.file(&format!("{setting}.db"))).arg(setting))
    };
    for setting in driver.settings {
        let written = call("write", &pair.primary, setting);
        pair.sync(&format!("{setting}.db"));
        let read = call("read", &pair.replica, setting);
        let (refusal, found) = read.split_once('\n').expect("a refusal, then what it holds");
        assert!(refusal.starts_with("refused: "), "{setting}: {refusal}");
        assert_eq!(found, written, "{setting}");
        pair.check(&format!("{setting}.db"));
    }
    for node in [&pair.primary, &pair.replica] {
        assert_eq!(node.log_count("level=ERROR"), 0, "the log of {}", node.url());
    }
}
