//! `litefs config check`: whether a configuration file would be taken.

use std::path::Path;

use anyhow::Context as _;

use super::flags::{self, Flag, Flags, Kind, Spec};
use super::{Failure, call, say, usage};
use crate::config::{self, Environment};

pub const SPEC: Spec = Spec {
    name: "config",
    arguments: "check [-config PATH] [-no-expand-env]",
    about: "Reads the configuration file as mount does, and says what is wrong with it.",
    flags: &[],
};

const CHECK: Spec = Spec {
    name: "config check",
    arguments: "",
    about: "Reads the configuration file as mount does, and says what is wrong with it.",
    flags: &[
        Flag { name: "config", kind: Kind::Value("PATH"), about: "the configuration file" },
        call::NO_EXPAND_ENV,
    ],
};

pub fn run(flags: Flags) -> Result<u8, Failure> {
    match flags.arguments.split_first() {
        Some((what, rest)) if what == "check" => check(rest),
        Some((what, _)) => Err(usage(anyhow::anyhow!("litefs config {what}: unknown command"))),
        None => Err(Failure::Help),
    }
}

fn check(arguments: &[String]) -> Result<u8, Failure> {
    let flags = match Flags::parse(&CHECK, arguments) {
        Ok(flags) => flags,
        Err(flags::Error::Help) => {
            say(CHECK.usage());
            return Ok(super::CODE_USAGE);
        }
        Err(error) => return Err(usage(error)),
    };
    if let Some(argument) = flags.arguments.first() {
        return Err(usage(anyhow::anyhow!("unexpected argument {argument:?}")));
    }
    let hostname = nix::unistd::gethostname().context("read host name")?;
    let environment = Environment::of_process(&hostname.to_string_lossy());
    let path = flags.given("config").map(Path::new);
    let loaded = config::load(path, call::expansion(&flags), &environment).map_err(usage)?;
    say(format_args!("{}: ok", loaded.path.display()));
    Ok(0)
}
