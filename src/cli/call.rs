//! The node that a command calls: its URL, and what it wants to be shown.
//!
//! Port, token and certificates come from the section `http` of the node's own configuration file, found as
//! `mount` finds it. Without such a file there are none, and the port is that of LiteFS.

use std::path::Path;

use anyhow::Context as _;

use super::flags::{Flag, Flags, Kind};
use super::{Failure, complain, usage};
use crate::config::{self, Environment, Expansion, Http, machine_name};
use crate::http::client::Client;
use crate::http::security::Security;
use crate::telemetry::log::chain;

/// `-url`.
pub const URL: Flag = Flag {
    name: "url",
    kind: Kind::Value("URL"),
    about: "the node's API (default: localhost and the port of http.addr, or http://localhost:20202)",
};

/// `-config`.
pub const CONFIG: Flag = Flag {
    name: "config",
    kind: Kind::Value("PATH"),
    about: "the node's configuration file, for http.addr, http.auth-token and http.tls",
};

/// `-no-expand-env`, which is to be given to all that read one file, or to none.
pub const NO_EXPAND_ENV: Flag = Flag {
    name: "no-expand-env",
    kind: Kind::Switch,
    about: "do not replace variables in the configuration file",
};

/// What [`NO_EXPAND_ENV`] says.
pub fn expansion(flags: &Flags) -> Expansion {
    match flags.is_on(NO_EXPAND_ENV.name) {
        true => Expansion::Off,
        false => Expansion::On,
    }
}

/// The node that the flags name.
pub fn client(flags: &Flags) -> Result<Client, Failure> {
    let config = http_section(flags.given("config"), expansion(flags))?;
    let security = Security::new(&config).context("configuration")?;
    let scheme = if security.has_tls() { "https" } else { "http" };
    let default = format!("{scheme}://{}", local_address(&config.addr));
    Ok(Client::new(flags.value("url").unwrap_or(&default), &security)?)
}

/// Where a program of the same machine reaches the API that listens at `addr`.
fn local_address(addr: &str) -> String {
    let (host, port) = addr.rsplit_once(':').unwrap_or((addr, ""));
    let port = if matches!(port, "" | "0") { "20202" } else { port };
    match host {
        "" | "0.0.0.0" | "[::]" => format!("localhost:{port}"),
        host => format!("{host}:{port}"),
    }
}

/// A file that is named must be good. One that is only found may be for somebody else.
fn http_section(path: Option<&str>, expansion: Expansion) -> Result<Http, Failure> {
    let hostname = machine_name().context("read host name")?;
    let environment = Environment::of_process(&hostname);
    match config::load(path.map(Path::new), expansion, &environment) {
        Ok(loaded) => Ok(loaded.config.http),
        Err(error) if path.is_some() => Err(usage(error)),
        Err(config::Error::NotFound) => Ok(Http::default()),
        Err(error) => {
            let error = chain(&error);
            complain(format_args!("WARNING: no token and no certificates are used: {error}"));
            Ok(Http::default())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::local_address;

    #[test]
    fn a_node_of_this_machine_is_found_by_its_own_file() {
        let check = |addr: &str, expected: &str| assert_eq!(local_address(addr), expected);
        check(":20202", "localhost:20202");
        check("0.0.0.0:1", "localhost:1");
        check("[::]:1", "localhost:1");
        check("127.0.0.1:8000", "127.0.0.1:8000");
        check("[fd00::1]:8000", "[fd00::1]:8000");
        check(":0", "localhost:20202");
    }
}
