//! What the proxy knows of its node, and waiting for it to change.
//!
//! Nothing is polled: the engine's events (a transaction of the database, a role, writes that go on), the stream to the
//! primary coming and going, readiness and the end of the node each wake who waits.

use std::sync::Arc;

use ltx::{NodeId, Txid};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use crate::engine::{Engine, Event, EventWatch, Role};
use crate::http::{Stop, stopped};

/// The primary as it has presented itself, for as long as the stream to it is open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its node id.
    pub node_id: Option<NodeId>,
    /// Where its proxy takes writes; none of LiteFS, and without a proxy.
    pub proxy_url: Option<String>,
}

/// Whether the stream to the primary is open, and to whom.
pub type Links = watch::Receiver<Option<Link>>;

/// What the proxy knows of its node.
pub(super) struct State {
    engine: Arc<Engine>,
    /// The one database whose transactions count.
    db: String,
    links: Links,
    ready: watch::Receiver<bool>,
    /// Changes with the position.
    moved: watch::Receiver<()>,
    /// Changes with the role.
    changed: watch::Receiver<()>,
    _events: EventWatch,
}

/// How a wait ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wake {
    /// Something changed.
    Changed,
    /// The time is over.
    Late,
    /// The node stops.
    Stopping,
}

/// What may change; begun before one looks, so that no change is missed.
pub(super) struct Changes {
    /// None for who does not care about the position.
    moved: Option<watch::Receiver<()>>,
    changed: watch::Receiver<()>,
    links: Links,
    ready: watch::Receiver<bool>,
    stop: Stop,
}

/// Where writes go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    /// This node is the primary.
    Here,
    /// The primary's host, by its name.
    Host(String),
    /// The primary's proxy, by its URL.
    Proxy(String),
    /// Nowhere now, but that may change: why.
    Nowhere(String),
    /// Nowhere with this primary: why.
    Never(String),
}

/// How a node finds its primary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// It passes writes on to the primary's proxy.
    Forward,
    /// It has Fly.io play them again on the primary's host.
    FlyReplay,
}

impl State {
    pub(super) fn new(
        engine: Arc<Engine>,
        db: String,
        links: Links,
        ready: watch::Receiver<bool>,
    ) -> State {
        let ((change, changed), (movement, moved)) = (watch::channel(()), watch::channel(()));
        let name = db.clone();
        let events = engine.watch_events(Box::new(move |event| match event {
            Event::Tx { db, .. } if db.as_str() == name => movement.send_replace(()),
            Event::Tx { .. } => {}
            Event::PrimaryChange { .. } | Event::WritesResumed => change.send_replace(()),
        }));
        State { engine, db, links, ready, moved, changed, _events: events }
    }

    /// Where the primary is, from now on.
    pub(super) fn primary_changes(&self, stop: &Stop) -> Changes {
        let (mut changed, mut links) = (self.changed.clone(), self.links.clone());
        changed.mark_unchanged();
        links.mark_unchanged();
        Changes { moved: None, changed, links, ready: self.ready.clone(), stop: stop.clone() }
    }

    /// The position of the database, and where the primary is, from now on.
    pub(super) fn changes(&self, stop: &Stop) -> Changes {
        let mut moved = self.moved.clone();
        moved.mark_unchanged();
        Changes { moved: Some(moved), ..self.primary_changes(stop) }
    }

    /// Whether the stream to a primary is open.
    pub(super) fn is_linked(&self) -> bool {
        self.links.borrow().is_some()
    }

    /// Waits until the stream is not open to the primary whose proxy is at `url`.
    pub(super) async fn until_former(&self, url: &str) {
        let is_at = |link: &Option<Link>| {
            link.as_ref().is_some_and(|link| link.proxy_url.as_deref() == Some(url))
        };
        let mut links = self.links.clone();
        if links.wait_for(|link| !is_at(link)).await.is_err() {
            // The node stops, which ends the request.
            std::future::pending().await
        }
    }

    pub(super) fn is_primary(&self) -> bool {
        self.engine.role() == Role::Primary
    }

    /// Whether the node has been primary, or has had all that its primary had.
    pub(super) fn is_ready(&self) -> bool {
        *self.ready.borrow()
    }

    /// Milliseconds since the last news of the primary, or since this node was one; none before either.
    pub(super) fn lag_ms(&self) -> Option<i64> {
        self.engine.silence_ms()
    }

    /// Whether this node is the primary for sure, so that nobody is ahead of it: not while its lease is
    /// not confirmed, or handed over.
    pub(super) fn leads(&self) -> bool {
        self.is_primary() && self.engine.shared().may_begin()
    }

    pub(super) fn node_id(&self) -> NodeId {
        self.engine.node_id()
    }

    pub(super) fn cluster_id(&self) -> Option<String> {
        self.engine.cluster_id().map(|id| id.to_string())
    }

    /// The last transaction that readers of the database see here; none without the database.
    pub(super) fn txid(&self) -> Option<Txid> {
        self.engine.database(&self.db).map(|db| db.pos().txid)
    }

    /// The last transaction that will be seen here without any more help.
    pub(super) fn received_txid(&self) -> Option<Txid> {
        self.engine.database(&self.db).map(|db| db.received_pos().txid)
    }

    /// Where writes go now; not back to one of the nodes that they have `passed`.
    pub(super) fn primary(&self, way: Way, passed: &[NodeId]) -> Place {
        match place(self.engine.role(), self.links.borrow().as_ref(), way, passed) {
            // The application would be refused, here and now.
            Place::Here if self.engine.has_stopped_writes() => {
                Place::Nowhere("the primary is handing its lease over".to_owned())
            }
            place => place,
        }
    }
}

fn place(role: Role, link: Option<&Link>, way: Way, passed: &[NodeId]) -> Place {
    let primary = match role {
        Role::Primary => return Place::Here,
        Role::Unknown => return Place::Nowhere("no primary available".to_owned()),
        Role::Replica(primary) => primary,
    };
    let host = primary.hostname;
    let link = match (way, link) {
        (Way::FlyReplay, _) if host.is_empty() => {
            return Place::Never(
                "the primary has no host name to replay the request on".to_owned(),
            );
        }
        (Way::FlyReplay, _) => return Place::Host(host),
        (Way::Forward, None) => {
            let url = primary.advertise_url;
            return Place::Nowhere(format!("no connection to the primary {host} at {url}"));
        }
        (Way::Forward, Some(link)) => link,
    };
    if link.node_id.is_some_and(|id| passed.contains(&id)) {
        return Place::Nowhere(format!("the primary {host} takes this node for the primary"));
    }
    match &link.proxy_url {
        Some(url) => Place::Proxy(url.clone()),
        None => Place::Never(format!(
            "the primary {host} has no proxy that takes writes of other nodes"
        )),
    }
}

impl Changes {
    /// Waits for a change, until `deadline` if there is one.
    pub(super) async fn next(&mut self, deadline: impl Into<Option<Instant>>) -> Wake {
        let late = async {
            match deadline.into() {
                Some(deadline) => sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        let moved = async {
            match &mut self.moved {
                Some(moved) => moved.changed().await,
                None => std::future::pending().await,
            }
        };
        // A sender that is gone, as the node ends, changes nothing more.
        tokio::select! {
            Ok(()) = moved => Wake::Changed,
            Ok(()) = self.changed.changed() => Wake::Changed,
            Ok(()) = self.links.changed() => Wake::Changed,
            () = late => Wake::Late,
            () = stopped(&mut self.stop) => Wake::Stopping,
        }
    }

    /// Waits until the node is ready, until `deadline`.
    pub(super) async fn ready(&mut self, deadline: Instant) -> Wake {
        tokio::select! {
            Ok(_) = self.ready.wait_for(|ready| *ready) => Wake::Changed,
            () = sleep_until(deadline) => Wake::Late,
            () = stopped(&mut self.stop) => Wake::Stopping,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::PrimaryInfo;

    fn replica() -> Role {
        let advertise_url = "http://h1:20202".to_owned();
        Role::Replica(PrimaryInfo { hostname: "h1".to_owned(), advertise_url })
    }

    fn link(proxy_url: Option<&str>) -> Link {
        Link { node_id: Some(NodeId(7)), proxy_url: proxy_url.map(str::to_owned) }
    }

    #[track_caller]
    fn check(role: Role, link: Option<&Link>, expected: Place) {
        assert_eq!(place(role, link, Way::Forward, &[NodeId(1)]), expected);
    }

    #[test]
    fn writes_go_to_the_primary() {
        let advertised = link(Some("http://h1:8080"));
        check(Role::Primary, None, Place::Here);
        check(replica(), Some(&advertised), Place::Proxy("http://h1:8080".to_owned()));
        assert_eq!(place(replica(), None, Way::FlyReplay, &[]), Place::Host("h1".to_owned()));
    }

    #[test]
    fn writes_wait_while_the_primary_is_unknown_or_away() {
        let why = "no connection to the primary h1 at http://h1:20202".to_owned();
        check(Role::Unknown, None, Place::Nowhere("no primary available".to_owned()));
        check(replica(), None, Place::Nowhere(why));
    }

    #[test]
    fn a_primary_without_a_proxy_is_no_use() {
        let why = "the primary h1 has no proxy that takes writes of other nodes".to_owned();
        check(replica(), Some(&link(None)), Place::Never(why));
    }

    #[test]
    fn no_request_goes_back_to_a_node_it_has_passed() {
        let why = "the primary h1 takes this node for the primary".to_owned();
        let place = place(replica(), Some(&link(Some("x"))), Way::Forward, &[NodeId(7)]);
        assert_eq!(place, Place::Nowhere(why));
    }
}
