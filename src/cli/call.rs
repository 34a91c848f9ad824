//! The node that a command calls: its URL, and what it wants to be shown.
//!
//! Token and certificates come from the section `http` of the node's own configuration file, found as
//! `mount` finds it. Without such a file there are none.

use std::path::Path;

use anyhow::Context as _;

use super::flags::{Flag, Flags, Kind};
use super::{Failure, usage};
use crate::config::{self, Environment, Expansion, Http};
use crate::http::client::Client;
use crate::http::security::Security;
use crate::telemetry::log::chain;

/// `-url`.
pub const URL: Flag = Flag {
    name: "url",
    kind: Kind::Value("URL"),
    about: "the node's API (default http://localhost:20202)",
};

/// `-config`.
pub const CONFIG: Flag = Flag {
    name: "config",
    kind: Kind::Value("PATH"),
    about: "the node's configuration file, for http.auth-token and http.tls",
};

/// The node that the flags name.
pub fn client(flags: &Flags) -> Result<Client, Failure> {
    let config = http_section(flags.value("config"))?;
    let security = Security::new(&config).context("configuration")?;
    let scheme = if security.has_tls() { "https" } else { "http" };
    let default = format!("{scheme}://localhost:20202");
    Ok(Client::new(flags.value("url").unwrap_or(&default), &security)?)
}

/// A file that is named must be good. One that is only found may be for somebody else.
fn http_section(path: Option<&str>) -> Result<Http, Failure> {
    let hostname = nix::unistd::gethostname().context("read host name")?;
    let environment = Environment::of_process(&hostname.to_string_lossy());
    match config::load(path.map(Path::new), Expansion::On, &environment) {
        Ok(loaded) => Ok(loaded.config.http),
        Err(error) if path.is_some() => Err(usage(error)),
        Err(config::Error::NotFound) => Ok(Http::default()),
        Err(error) => {
            eprintln!("WARNING: no token and no certificates are used: {}", chain(&error));
            Ok(Http::default())
        }
    }
}
