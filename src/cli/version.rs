//! `litefs version`.

use super::flags::{Flags, Spec};
use super::{Failure, say};

pub const SPEC: Spec =
    Spec { name: "version", arguments: "", about: "Prints the version.", flags: &[] };

pub fn run(_flags: Flags) -> Result<u8, Failure> {
    say(text());
    Ok(0)
}

/// The version line. The commit is known if `LITEFS_COMMIT` was set when the program was built.
pub fn text() -> String {
    let version = format!("LiteFS v{}", env!("CARGO_PKG_VERSION"));
    match option_env!("LITEFS_COMMIT") {
        Some(commit) if !commit.is_empty() => format!("{version}, commit={commit}"),
        _ => version,
    }
}
