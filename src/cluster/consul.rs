//! The lease as it stands in Consul.
//!
//! ```text
//! K                   locked by the primary's session; {"hostname","advertise-url",...} of the primary
//! K/clusterid         the cluster id, 20 characters, made once
//! K/positions         the record of the primary (`election::Record`)
//! K/candidates/ID     locked by a candidate that waits for the lease (`election::Rival`)
//! ```
//!
//! K and K/clusterid are LiteFS's, byte for byte; fields that LiteFS does not know are ignored by it.
//! K's value is empty after a clean release; K is gone after its session was lost (behaviour
//! "delete"), and then cannot be locked for the lock-delay. K/positions is written together with a
//! check that K is as the writer knows it, so that nobody but the primary writes it. A lease is handed over by a
//! note in K's value, and taken up or taken back by a change of K that holds only if K is as it was. LiteFS does
//! not look how K is, but takes what is locked by the session that it was told; so who takes a lease back moves
//! it to another session, in the same change.
//!
//! **Invariant:** whoever takes K after its session was lost waits until the primary before it has
//! fenced itself ([`Timing`]); `docs/decisions/` has the argument.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use ltx::NodeId;
use serde::{Deserialize, Serialize};

use super::election::{Record, Rival};
use crate::engine::{ClusterId, PrimaryInfo};
use crate::limits;

pub mod address;
pub mod client;
#[cfg(any(test, fuzzing))]
pub(crate) mod properties;

pub use client::Error;
use client::{Client, Consistency, Entry, NewSession, Outcome, Renewed, Step};

/// The name of a session, and of a node of the catalogue.
const NAME: &str = "litefs";

/// The times of a lease, all parts of its TTL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// How long a session lives unrenewed, at least.
    pub ttl: Duration,
    /// How long after the sending of the last confirmed request a primary still commits.
    pub fence: Duration,
    /// Between two confirmations.
    pub period: Duration,
    /// How long a call may take that confirms the lease.
    pub call: Duration,
}

impl Timing {
    /// The times for a TTL: with 10 s a fence of 2.5 s, confirmed each second.
    pub fn of(ttl: Duration) -> Timing {
        let period = (ttl / 10).min(Duration::from_secs(1));
        Timing { ttl, fence: ttl / 4, period, call: ttl / 10 }
    }

    /// How long a primary that fences itself after `fence` may still commit, seen from elsewhere:
    /// clocks need not run alike.
    fn until_fenced(fence: Duration) -> Duration {
        fence + fence / 5
    }

    /// For how long nobody can lock the key after its session was lost: at least until the primary
    /// has fenced itself, which also keeps off nodes that know nothing of fences.
    fn lock_delay(&self, configured: Duration) -> Duration {
        configured.max(Timing::until_fenced(self.fence))
    }
}

/// What a node needs to know of the lease's configuration.
#[derive(Debug, Clone)]
pub struct Options {
    /// `lease.consul.key`.
    pub key: String,
    /// `lease.consul.ttl`.
    pub ttl: Duration,
    /// `lease.consul.lock-delay`.
    pub lock_delay: Duration,
    /// Who we are to others.
    pub me: PrimaryInfo,
    /// This process.
    pub node_id: NodeId,
}

/// The lease in Consul, as one node sees it.
pub struct Consul {
    client: Client,
    options: Options,
    timing: Timing,
    /// K
    key: String,
    /// The node of the catalogue that sessions belong to; none without a prefix.
    node: Option<String>,
}

/// The value of K.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct Value {
    hostname: String,
    advertise_url: String,
    /// The process; LiteFS does not say it.
    #[serde(skip_serializing_if = "Option::is_none")]
    node_id: Option<String>,
    /// After how long it fences itself; LiteFS does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    fence_ms: Option<u64>,
    /// Whom it hands the lease to.
    #[serde(skip_serializing_if = "Option::is_none")]
    handoff_to: Option<String>,
}

/// Who has the lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Holder {
    /// This node or another one.
    Somebody(Held),
    /// Nobody, after a clean release.
    Released,
    /// Nobody, and nobody knows since when.
    Nobody,
}

/// A lease that somebody has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// Who.
    pub primary: PrimaryInfo,
    /// With which session.
    pub session: String,
    /// After how long without a confirmation that node commits no more; none if it does not say so.
    pub fence: Option<Duration>,
    /// Its process, if it says so.
    pub node_id: Option<NodeId>,
    /// The process to which it is handing the lease over.
    pub handoff_to: Option<NodeId>,
    /// Changes with the key.
    pub index: u64,
}

/// Why the lease is not ours any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost(pub String);

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Consul {
    /// The lease at `options.key` below the client's prefix. No call is made.
    pub fn new(client: Client, options: Options) -> Consul {
        let prefix = &client.address().prefix;
        let key = address::clean(&format!("{prefix}/{}", options.key));
        let node = (!prefix.is_empty()).then(|| format!("{prefix}/{NAME}"));
        Consul { timing: Timing::of(options.ttl), client, options, key, node }
    }

    /// Where Consul is, without secrets.
    pub fn address(&self) -> String {
        self.client.address().to_string()
    }

    /// The times of the lease.
    pub fn timing(&self) -> &Timing {
        &self.timing
    }

    /// Who we are to others.
    pub fn me(&self) -> &PrimaryInfo {
        &self.options.me
    }

    /// Who has the lease, as a majority of Consul's servers has it.
    pub async fn holder(&self) -> Result<Holder, Error> {
        let entry = self.client.read(&self.key, Consistency::Consistent, limits::CONSUL_WAIT);
        Ok(holder(entry.await?))
    }

    /// Waits until the key is not what it was at `index` (0 for a first look), or for some time.
    pub async fn watch(&self, index: u64) -> Result<(u64, Holder), Error> {
        let (now, entry) = self.client.watch(&self.key, index, limits::CONSUL_WATCH).await?;
        Ok((now, holder(entry)))
    }

    /// How long a primary may still commit whose lease is `held`, from the moment at which its session
    /// is known to be over; none if it does not say that it fences itself.
    pub fn wait_after(&self, held: &Held) -> Option<Duration> {
        held.fence.map(Timing::until_fenced)
    }

    /// How long any primary of this cluster may still commit, from the moment at which the key is
    /// known to be gone.
    pub fn wait_after_nobody(&self) -> Duration {
        Timing::until_fenced(self.timing.fence)
    }

    /// Whether `held` names this node, whichever process of it.
    pub fn is_me(&self, held: &Held) -> bool {
        held.primary.advertise_url == self.options.me.advertise_url
    }

    /// The text that stands for the cluster id.
    pub async fn cluster_id(&self) -> Result<Option<String>, Error> {
        let key = format!("{}/clusterid", self.key);
        let entry = self.client.read(&key, Consistency::Consistent, limits::CONSUL_WAIT).await?;
        Ok(entry.map(|entry| String::from_utf8_lossy(&entry.value).into_owned()))
    }

    /// Makes `id` the cluster id, unless there is one; whether it was made.
    pub async fn create_cluster_id(&self, id: &ClusterId) -> Result<bool, Error> {
        let key = format!("{}/clusterid", self.key);
        self.client.create(&key, id.as_str().as_bytes(), limits::CONSUL_WAIT).await
    }

    /// A session of its own for the lease.
    pub async fn open_session(&self) -> Result<String, Error> {
        if let Some(node) = &self.node {
            self.client.register_node(node, limits::CONSUL_WAIT).await?;
        }
        let session = NewSession {
            behavior: "delete",
            lock_delay: milliseconds(self.timing.lock_delay(self.options.lock_delay)),
            name: NAME,
            node: self.node.as_deref(),
            node_checks: [],
            ttl: go_duration(self.timing.ttl),
        };
        self.client.create_session(&session, limits::CONSUL_WAIT).await
    }

    /// Lets a session live on; whether it is there.
    pub async fn renew(&self, session: &str) -> Result<bool, Error> {
        Ok(self.client.renew(session, limits::CONSUL_WAIT).await? == Renewed::Yes)
    }

    /// Ends a session; what it has locked is gone.
    pub async fn end_session(&self, session: &str) -> Result<(), Error> {
        self.client.destroy_session(session, limits::CONSUL_WAIT).await
    }

    /// Ends a session that nothing depends on, beside everything else. What fails is up to the TTL.
    pub fn end_unused(self: &Arc<Consul>, session: String) {
        let consul = self.clone();
        tokio::spawn(async move {
            if let Err(error) = consul.end_session(&session).await {
                tracing::debug!(error = crate::engine::chain_text(&error), "end unused session");
            }
        });
    }

    /// Takes the lease if nobody has it, or if this session has it already: the key's index. None if
    /// another session has it, or if its key is not free yet.
    pub async fn acquire(&self, session: &str) -> Result<Option<u64>, Error> {
        let value = self.value(None);
        self.change(&[Step::Lock(&self.key, session, &value)]).await
    }

    /// Takes over a lease that a session has, unless the key has changed since it had the index `at`;
    /// the key's new index.
    pub async fn take_up(&self, session: &str, at: u64) -> Result<Option<u64>, Error> {
        let value = self.value(None);
        let steps = [Step::CheckIndex(&self.key, at), Step::Lock(&self.key, session, &value)];
        self.change(&steps).await
    }

    /// Takes back a lease that was offered to another node, unless the key has changed since it had the
    /// index `at`; the key's new index. It is that of the session `own` then, which nobody else was told of:
    /// the one that was offered is worth nothing any more.
    pub async fn take_back(&self, offered: &str, at: u64, own: &str) -> Result<Option<u64>, Error> {
        let value = self.value(None);
        let steps = [
            Step::CheckIndex(&self.key, at),
            Step::Unlock(&self.key, offered),
            Step::Lock(&self.key, own, &value),
        ];
        self.change(&steps).await
    }

    /// Takes all steps or none; the index of the last one's key.
    async fn change(&self, steps: &[Step<'_>]) -> Result<Option<u64>, Error> {
        match self.client.transact(steps, limits::CONSUL_WAIT).await? {
            Outcome::Done(index) => Ok(Some(index)),
            Outcome::Refused(why) => {
                tracing::debug!(why, "lease not taken");
                Ok(None)
            }
        }
    }

    /// Gives the lease back: the key is emptied, and its session ended. What fails is up to the TTL.
    pub async fn release(&self, session: &str) {
        if let Err(error) = self.client.release(&self.key, session, limits::CONSUL_WAIT).await {
            tracing::warn!(error = crate::engine::chain_text(&error), "give lease back");
        }
        if let Err(error) = self.end_session(session).await {
            tracing::warn!(error = crate::engine::chain_text(&error), "end session of lease");
        }
    }

    /// Confirms that the lease is ours, and renews its session; the key's index.
    pub async fn confirm(&self, session: &str) -> Result<Result<u64, Lost>, Error> {
        let wait = self.timing.call;
        let renew = self.client.renew(session, wait);
        let read = self.client.read(&self.key, Consistency::Consistent, wait);
        let (renewed, entry) = tokio::try_join!(renew, read)?;
        if renewed == Renewed::Gone {
            return Ok(Err(Lost("its session is over".to_owned())));
        }
        Ok(match holder(entry) {
            Holder::Somebody(held) if held.session == session && self.is_mine(&held) => {
                Ok(held.index)
            }
            Holder::Somebody(held) => Err(Lost(format!("{:?} has it", held.primary.hostname))),
            Holder::Released | Holder::Nobody => Err(Lost("its key was given up".to_owned())),
        })
    }

    /// What the last primary wrote about itself; none also for a text that makes no sense.
    pub async fn record(&self) -> Result<Option<Record>, Error> {
        let key = self.positions_key();
        let entry = self.client.read(&key, Consistency::Consistent, limits::CONSUL_WAIT).await?;
        Ok(entry.and_then(|entry| serde_json::from_slice(&entry.value).ok()))
    }

    /// Writes what this node has, if the lease's key is as it was at the index `at`; whether it is.
    pub async fn publish(&self, at: u64, record: &Record) -> Result<bool, Error> {
        let (key, text) = (self.positions_key(), encode(record));
        let steps = [Step::CheckIndex(&self.key, at), Step::Set(&key, &text)];
        let outcome = self.client.transact(&steps, self.timing.call).await?;
        Ok(matches!(outcome, Outcome::Done(_)))
    }

    /// Offers the lease to the process `to`, with what it must have to take it; the key's index.
    pub async fn offer(
        &self,
        session: &str,
        record: &Record,
        to: NodeId,
    ) -> Result<Result<u64, Lost>, Error> {
        let (key, text, value) = (self.positions_key(), encode(record), self.value(Some(to)));
        let steps = [
            Step::CheckSession(&self.key, session),
            Step::Set(&key, &text),
            Step::Lock(&self.key, session, &value),
        ];
        Ok(match self.client.transact(&steps, limits::CONSUL_WAIT).await? {
            Outcome::Done(index) => Ok(index),
            Outcome::Refused(why) => Err(Lost(why)),
        })
    }

    /// Says how far this candidate is, for as long as its session lives.
    pub async fn stand(&self, session: &str, rival: &Rival) -> Result<bool, Error> {
        let key = self.candidate_key();
        self.client.acquire(&key, session, &encode(rival), limits::CONSUL_WAIT).await
    }

    /// The other candidates.
    pub async fn rivals(&self) -> Result<Vec<Rival>, Error> {
        let prefix = format!("{}/candidates/", self.key);
        let own = self.candidate_key();
        let entries = self.client.list(&prefix, limits::CONSUL_WAIT).await?;
        let others =
            entries.into_iter().filter(|entry| entry.key != own && entry.session.is_some());
        Ok(others.filter_map(|entry| serde_json::from_slice(&entry.value).ok()).collect())
    }

    /// This node does not stand any more.
    pub async fn withdraw(&self) -> Result<(), Error> {
        self.client.delete(&self.candidate_key(), limits::CONSUL_WAIT).await
    }

    /// Whether `held` names this very process.
    pub fn is_mine(&self, held: &Held) -> bool {
        held.node_id == Some(self.options.node_id)
    }

    fn positions_key(&self) -> String {
        format!("{}/positions", self.key)
    }

    fn candidate_key(&self) -> String {
        format!("{}/candidates/{}", self.key, self.options.node_id)
    }

    fn value(&self, handoff_to: Option<NodeId>) -> Vec<u8> {
        let PrimaryInfo { hostname, advertise_url } = self.options.me.clone();
        encode(&Value {
            hostname,
            advertise_url,
            node_id: Some(self.options.node_id.to_string()),
            fence_ms: Some(self.timing.fence.as_millis() as u64), // far below 2^64
            handoff_to: handoff_to.map(|id| id.to_string()),
        })
    }
}

fn holder(entry: Option<Entry>) -> Holder {
    let Some(entry) = entry else { return Holder::Nobody };
    // A value that nobody has locked is what an operator left there: the lease can be taken.
    let Some(session) = entry.session else {
        return if entry.value.is_empty() { Holder::Released } else { Holder::Nobody };
    };
    let value: Value = serde_json::from_slice(&entry.value).unwrap_or_default();
    let id = |text: Option<String>| text.and_then(|text| text.parse().ok());
    Holder::Somebody(Held {
        primary: PrimaryInfo { hostname: value.hostname, advertise_url: value.advertise_url },
        session,
        fence: value.fence_ms.map(Duration::from_millis),
        node_id: id(value.node_id),
        handoff_to: id(value.handoff_to),
        index: entry.index,
    })
}

fn encode(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("plain texts and numbers encode")
}

/// As LiteFS writes a lock-delay: whole milliseconds, at least one.
fn milliseconds(wait: Duration) -> String {
    format!("{}ms", wait.as_millis().max(1))
}

/// As Go reads a duration of whole milliseconds: `10s`, `1m30s`, `1.5s`.
fn go_duration(duration: Duration) -> String {
    let (seconds, ms) = (duration.as_secs(), duration.subsec_millis());
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    let mut text = String::new();
    if hours > 0 {
        text += &format!("{hours}h");
    }
    if hours > 0 || minutes > 0 {
        text += &format!("{minutes}m");
    }
    let fraction = format!(".{ms:03}");
    text + &format!("{}{}s", seconds % 60, fraction.trim_end_matches('0').trim_end_matches('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_follow_from_the_ttl() {
        let timing = Timing::of(Duration::from_secs(10));
        let ms = Duration::from_millis;
        assert_eq!((timing.fence, timing.call, timing.period), (ms(2500), ms(1000), ms(1000)));
        assert_eq!(timing.lock_delay(ms(1000)), ms(3000));
        assert_eq!(timing.lock_delay(ms(15000)), ms(15000));
        assert_eq!(Timing::of(ms(60_000)).period, ms(1000));
        assert_eq!(Timing::of(ms(2000)).period, ms(200));
    }

    #[test]
    fn durations_are_written_as_go_does() {
        let check = |ms, expected: &str| {
            assert_eq!(go_duration(Duration::from_millis(ms)), expected);
        };
        check(10_000, "10s");
        check(90_000, "1m30s");
        check(3_600_000, "1h0m0s");
        check(1500, "1.5s");
        check(250, "0.25s");
        assert_eq!(milliseconds(Duration::from_micros(1)), "1ms");
    }

    fn entry(value: &str, session: Option<&str>) -> Option<Entry> {
        let session = session.map(str::to_owned);
        Some(Entry { key: "k".to_owned(), value: value.into(), session, index: 7 })
    }

    #[test]
    fn the_key_says_who_has_the_lease() {
        assert_eq!(holder(None), Holder::Nobody);
        assert_eq!(holder(entry("", None)), Holder::Released);
        assert_eq!(holder(entry("{}", None)), Holder::Nobody);
        // Of LiteFS.
        let text = r#"{"hostname":"h1","advertise-url":"http://10.0.0.1:20202"}"#;
        let Holder::Somebody(held) = holder(entry(text, Some("s"))) else { panic!() };
        assert_eq!(held.primary.hostname, "h1");
        assert_eq!(held.primary.advertise_url, "http://10.0.0.1:20202");
        assert_eq!((held.fence, held.node_id, held.handoff_to), (None, None, None));
    }

    #[test]
    fn the_value_begins_as_litefs_writes_it() {
        let value = Value {
            hostname: "h1".to_owned(),
            advertise_url: "http://10.0.0.1:20202".to_owned(),
            ..Value::default()
        };
        let expected = r#"{"hostname":"h1","advertise-url":"http://10.0.0.1:20202"}"#;
        assert_eq!(String::from_utf8(encode(&value)).unwrap(), expected);
        let value = Value { fence_ms: Some(2500), node_id: Some("01".to_owned()), ..value };
        let json = String::from_utf8(encode(&value)).unwrap();
        assert!(json.starts_with(expected.trim_end_matches('}')), "{json}");
        let Holder::Somebody(held) = holder(entry(&json, Some("s"))) else { panic!() };
        assert_eq!(
            (held.fence, held.node_id),
            (Some(Duration::from_millis(2500)), Some(NodeId(1)))
        );
    }
}
