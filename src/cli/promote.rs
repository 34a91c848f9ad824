//! `litefs promote`: makes a node the primary, and returns when it is.

use super::flags::{Flag, Flags, Kind, Spec};
use super::{Failure, block_on, call, say, usage};
use crate::cluster::election::Force;
use crate::http::client::Error;

pub const SPEC: Spec = Spec {
    name: "promote",
    arguments: "",
    about: "Makes a node the primary.",
    flags: &[
        Flag {
            name: "force",
            kind: Kind::Switch,
            about: "without a primary, lead even if others may have more data, or if this node has none",
        },
        call::URL,
        call::CONFIG,
        call::NO_EXPAND_ENV,
    ],
};

pub fn run(flags: Flags) -> Result<u8, Failure> {
    if !flags.arguments.is_empty() {
        return Err(usage(anyhow::anyhow!("too many arguments")));
    }
    let client = call::client(&flags)?;
    let force = if flags.is_on("force") { Force::Yes } else { Force::No };
    match block_on(client.promote(force))? {
        Ok(()) => {}
        Err(Error::Response { text, .. }) if !text.is_empty() => {
            return Err(anyhow::anyhow!(text).into());
        }
        Err(error) => return Err(error.into()),
    }
    say("this node is the primary");
    Ok(0)
}
