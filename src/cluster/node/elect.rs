//! Who has the lease in Consul, and whether this node takes it if nobody has.
//!
//! A free key is taken only after the time in which the primary before may still commit, unless it
//! was given back cleanly. Meanwhile each candidate writes how far it is, and the one that is furthest goes
//! first ([`crate::cluster::election`]).

use std::sync::Arc;
use std::time::Duration;

use ltx::{NodeId, Pos};
use tokio::time::timeout;

use super::lead::{Lease, Tenure};
use super::{Candidacy, Error, Found, Leader, Membership, Node};
use crate::boot_time::BootTime;
use crate::cluster::consul::{Consul, Held, Holder};
use crate::cluster::election::{Field, Force, Record, Rival, Standing, Verdict};
use crate::cluster::replica;
use crate::engine::{ClusterId, DbName, chain_text};
use crate::limits;

/// Between two looks at a lease that is about to be taken.
const LOOK: Duration = Duration::from_millis(100);

/// How often a primary's port must be found closed.
const REFUSALS: u32 = 2;

/// What a candidate does while nobody has the lease.
#[derive(Default)]
pub(super) struct Campaign {
    /// Its session, and when it was last known to live.
    session: Option<(String, BootTime)>,
    /// What it wrote about itself.
    stands: Option<Rival>,
    /// Since when nobody is known to have the lease.
    free: Option<Free>,
    /// The process of the primary to which this one was last connected. Its session may have been another one by then: an
    /// offer that is taken back changes it.
    met: Option<NodeId>,
    /// The process of a primary whose port is closed, and how often it was found so.
    refused: Option<(NodeId, u32)>,
}

/// A lease that nobody has.
#[derive(Debug, Clone, Copy)]
struct Free {
    /// When that was found out.
    since: BootTime,
    /// Until when the primary before may still commit.
    until: BootTime,
}

impl Campaign {
    /// A stream to this primary is open.
    pub(super) fn met(&mut self, primary: Option<NodeId>) {
        self.met = primary;
        self.refused = None;
    }

    /// The port of this primary is closed.
    pub(super) fn refused(&mut self, primary: Option<NodeId>) {
        let Some(primary) = primary else { return };
        match &mut self.refused {
            Some((known, count)) if *known == primary => *count += 1,
            refused => *refused = Some((primary, 1)),
        }
    }

    /// The primary may be there after all.
    pub(super) fn answered(&mut self) {
        self.refused = None;
    }

    /// Whether this process is gone, as far as can be told: this node was connected to it, and its
    /// port is closed now.
    fn is_dead(&self, primary: NodeId) -> bool {
        let refused = |(known, count)| known == primary && count >= REFUSALS;
        self.met == Some(primary) && self.refused.is_some_and(refused)
    }
}

impl Node {
    /// Gets the lease, or finds who has it.
    pub(super) async fn find_in(&mut self, consul: &Arc<Consul>) -> Result<Found, Error> {
        let theirs = self.leased_cluster_id(consul).await?;
        let membership = self.check_cluster(theirs.as_ref())?;
        match consul.holder().await? {
            Holder::Somebody(held) if consul.is_me(&held) => {
                if let Some(found) = self.resume(consul, &held).await? {
                    return Ok(found);
                }
            }
            Holder::Somebody(held) => {
                let is_dead = held.node_id.is_some_and(|id| self.campaign.is_dead(id));
                let dead = held.fence.is_some() && is_dead;
                if !dead || !self.may_stand() || membership == Membership::Unproven {
                    self.campaign.free = None;
                    self.end_campaign().await;
                    let Held { primary, node_id, .. } = held;
                    return Ok(Found::Primary(Leader { primary, node_id }));
                }
                self.bury(consul, &held).await?;
            }
            Holder::Released => self.found_free(Duration::ZERO),
            Holder::Nobody => self.found_free(consul.wait_after_nobody()),
        }
        self.elect(consul, theirs, membership).await
    }

    pub(super) async fn leased_cluster_id(
        &self,
        consul: &Consul,
    ) -> Result<Option<ClusterId>, Error> {
        let parse = |id: String| {
            let kind = self.leaser.kind();
            ClusterId::new(&id).ok_or(Error::InvalidClusterId { kind, id })
        };
        consul.cluster_id().await?.map(parse).transpose()
    }

    /// Whether this node takes leases at all.
    fn may_stand(&self) -> bool {
        self.options.candidacy == Candidacy::Candidate && !self.steps_down
    }

    /// Notes that nobody has the lease, and for how long from now another node may still commit.
    fn found_free(&mut self, wait: Duration) {
        let now = BootTime::now();
        let until = if wait.is_zero() { BootTime::START } else { now.after(wait) };
        let free = self.campaign.free.get_or_insert(Free { since: now, until });
        if wait.is_zero() {
            free.until = BootTime::START;
        }
    }

    /// Takes up the lease of an earlier process of this node, or of this one. None if nobody has the
    /// lease any more.
    async fn resume(&mut self, consul: &Arc<Consul>, held: &Held) -> Result<Option<Found>, Error> {
        let session = &held.session;
        if self.memory.session().as_deref() != Some(session) || !self.may_stand() {
            let text = "the lease is that of an earlier process of this node, or of another node with \
                        the same advertise-url: waiting for its session in Consul to end";
            self.reports.warn(text, format_args!("{text}"));
            return Ok(Some(Found::Wait(self.options.reconnect_delay)));
        }
        let sent = BootTime::now();
        if !consul.renew(session).await? {
            self.found_free(consul.wait_after_nobody());
            return Ok(None);
        }
        let (own, record) = (self.lineage.standing(&self.engine), consul.record().await?);
        let positions = self.lineage.positions(&self.engine);
        let behind = record.as_ref().and_then(|record| record.is_ahead_of(&own, &positions));
        if let Some(lacks) = behind.filter(|_| self.force() == Force::No) {
            tracing::warn!(
                "this node had the lease, but has lost transactions since: it {lacks}; giving the lease \
                 back, for others may have them"
            );
            consul.release(session).await;
            self.remember_session(None).await?;
            // Nobody committed with it but the process before this one.
            self.found_free(Duration::ZERO);
            return Ok(None);
        }
        let Some((session, index)) = self.take_up_own(consul, held).await? else {
            return Ok(Some(Found::Wait(LOOK)));
        };
        tracing::info!("took up the lease of before: its session was still there");
        let term = self.field(&own, &positions, record.as_ref(), &[]).next_term();
        let consul = consul.clone();
        Ok(Some(Found::Lease(Lease::Consul(Tenure {
            consul,
            session,
            index,
            term,
            confirmed: sent,
            written: None,
            fenced: false,
        }))))
    }

    /// Takes up the lease of before: its session, or another one if that was offered to another node, and
    /// the index of its key. None if somebody was quicker.
    async fn take_up_own(
        &self,
        consul: &Arc<Consul>,
        held: &Held,
    ) -> Result<Option<(String, u64)>, Error> {
        let session = held.session.clone();
        if held.handoff_to.is_none() {
            let index = consul.take_up(&session, held.index).await?;
            return Ok(index.map(|index| (session, index)));
        }
        let own = consul.open_session().await?;
        let Some(index) = consul.take_back(&session, held.index, &own).await? else {
            consul.end_unused(own);
            return Ok(None);
        };
        self.note_taken_back(consul, session, &own).await;
        Ok(Some((own, index)))
    }

    /// Ends the session of a primary whose process is gone.
    async fn bury(&mut self, consul: &Consul, held: &Held) -> Result<(), Error> {
        let Some(wait) = consul.wait_after(held) else { return Ok(()) };
        let hostname = &held.primary.hostname;
        consul.end_session(&held.session).await?;
        tracing::warn!(
            "the primary {hostname:?} is gone (its port is closed): its lease was ended, and another \
             node takes it in {:.1} s",
            wait.as_secs_f32()
        );
        let since = BootTime::now();
        self.campaign.free = Some(Free { since, until: since.after(wait) });
        Ok(())
    }

    /// Takes the lease that nobody has, or says how long to wait.
    async fn elect(
        &mut self,
        consul: &Arc<Consul>,
        theirs: Option<ClusterId>,
        membership: Membership,
    ) -> Result<Found, Error> {
        if self.options.candidacy == Candidacy::ReplicaOnly {
            return Err(Error::Ineligible);
        }
        if self.steps_down {
            return Ok(Found::Wait(self.options.reconnect_delay));
        }
        if let (Some(theirs), Membership::Unproven, Force::No) = (&theirs, membership, self.force())
        {
            return Err(Error::Unproven { theirs: theirs.clone() });
        }
        if !self.has_applied_all(LOOK).await {
            let text = "this node has not applied yet what it has received";
            self.reports.info(text, format_args!("no primary: {text}"));
            return Ok(Found::Wait(LOOK));
        }
        let own = self.lineage.standing(&self.engine);
        let session = self.session(consul).await?;
        // Of a cluster that never had a primary nobody can have anything.
        let new = theirs.is_none() && self.engine.cluster_id().is_none() && own.is_empty();
        if !new {
            self.stand(consul, &session, &own).await?;
        }
        if let Some(pause) = self.must_wait(consul, &own).await? {
            return Ok(Found::Wait(pause));
        }
        let until = self.campaign.free.map_or(BootTime::START, |free| free.until);
        let left = until.since(BootTime::now());
        if !new && !left.is_zero() {
            self.reports.info("fence", format_args!("no primary: this node takes the lease"));
            return Ok(Found::Wait(left.min(LOOK)));
        }
        self.take(consul, session, &own).await
    }

    /// Takes the lease with `session`.
    async fn take(
        &mut self,
        consul: &Arc<Consul>,
        session: String,
        own: &Standing,
    ) -> Result<Found, Error> {
        let confirmed = BootTime::now();
        let Some(index) = consul.acquire(&session).await? else {
            self.reports.info("lock", format_args!("the lease's key cannot be locked yet"));
            return Ok(Found::Wait(LOOK));
        };
        self.remember_session(Some(session.clone())).await?;
        // Others may have been primary, or stood, since it was decided to take it.
        let pause = self.must_wait(consul, own).await?;
        let (record, rivals) = (consul.record().await?, consul.rivals().await?);
        if let Some(pause) = pause {
            consul.release(&session).await;
            self.remember_session(None).await?;
            self.campaign = Campaign { free: self.campaign.free, ..Campaign::default() };
            return Ok(Found::Wait(pause));
        }
        let positions = self.lineage.positions(&self.engine);
        let field = self.field(own, &positions, record.as_ref(), &rivals);
        if let Verdict::RunBehind(why) = field.verdict() {
            tracing::warn!("taking the lease although transactions are missing: {why}");
        }
        let term = field.next_term();
        if self.campaign.stands.is_some() {
            // Its session lives on with the lease, and perhaps on another node.
            consul.withdraw().await?;
        }
        self.campaign = Campaign::default();
        Ok(Found::Lease(Lease::Consul(Tenure {
            consul: consul.clone(),
            session,
            index,
            term,
            confirmed,
            written: None,
            fenced: false,
        })))
    }

    /// How long to let others have the lease; none if this node may take it.
    async fn must_wait(
        &mut self,
        consul: &Consul,
        own: &Standing,
    ) -> Result<Option<Duration>, Error> {
        self.force();
        let (record, rivals) = (consul.record().await?, consul.rivals().await?);
        let positions = self.lineage.positions(&self.engine);
        match self.field(own, &positions, record.as_ref(), &rivals).verdict() {
            Verdict::Run | Verdict::RunBehind(_) => Ok(None),
            Verdict::Wait(why) => {
                self.reports.info(&why, format_args!("no primary: waiting, because {why}"));
                Ok(Some(LOOK))
            }
            Verdict::Never(why) => {
                self.reports.warn(&why, format_args!("no primary: {why}"));
                Ok(Some(self.options.reconnect_delay))
            }
        }
    }

    fn field<'a>(
        &self,
        own: &'a Standing,
        positions: &'a [(DbName, Pos)],
        record: Option<&'a Record>,
        rivals: &'a [Rival],
    ) -> Field<'a> {
        let since = self.campaign.free.map(|free| BootTime::now().since(free.since));
        let force = if self.forced.is_empty() { Force::No } else { Force::Yes };
        Field { own, positions, record, rivals, waited: since.unwrap_or_default(), force }
    }

    /// The session of the campaign, made if there is none.
    async fn session(&mut self, consul: &Consul) -> Result<String, Error> {
        let now = BootTime::now();
        if let Some((session, alive)) = &mut self.campaign.session {
            let fresh = now.since(*alive) < consul.timing().ttl / 3;
            if fresh || consul.renew(session).await? {
                if !fresh {
                    *alive = now;
                }
                return Ok(session.clone());
            }
        }
        let session = consul.open_session().await?;
        self.campaign.session = Some((session.clone(), now));
        self.campaign.stands = None;
        Ok(session)
    }

    /// Writes how far this node is, for the other candidates.
    async fn stand(&mut self, consul: &Consul, session: &str, own: &Standing) -> Result<(), Error> {
        let rival = Rival { standing: own.clone(), hostname: self.options.hostname.clone() };
        if self.campaign.stands.as_ref() != Some(&rival) && consul.stand(session, &rival).await? {
            self.campaign.stands = Some(rival);
        }
        Ok(())
    }

    /// Ends what a campaign has left in Consul.
    pub(super) async fn end_campaign(&mut self) {
        let Some((session, _)) = self.campaign.session.take() else { return };
        self.campaign.stands = None;
        let super::Leaser::Consul(consul) = &self.leaser else { return };
        let end = async {
            // Its TTL ends what this does not.
            let _ = consul.withdraw().await;
            consul.release(&session).await;
        };
        let _ = timeout(limits::CONSUL_WAIT, end).await;
    }

    /// Whether everything that was received is applied, at the latest after `wait`.
    async fn has_applied_all(&self, wait: Duration) -> bool {
        let targets = self.engine.positions();
        timeout(wait, replica::wait_applied(&self.engine, targets)).await.is_ok()
    }

    /// Takes the lease that the primary's stream has offered, or sees to it that somebody else gets it.
    pub(super) async fn take_offer(&mut self, session: &str) -> Result<Option<Tenure>, Error> {
        let super::Leaser::Consul(consul) = &self.leaser else {
            tracing::warn!("ignored handoff of lease {session:?}: not supported by this lease");
            return Ok(None);
        };
        let consul = consul.clone();
        let taken = self.take_if_met(&consul, session).await;
        if !matches!(taken, Ok(Some(_))) {
            give_back(&consul, session).await;
        }
        taken
    }

    /// Takes an offered lease if it was offered to this node and this node has everything that its primary had.
    async fn take_if_met(
        &mut self,
        consul: &Arc<Consul>,
        session: &str,
    ) -> Result<Option<Tenure>, Error> {
        let refuse = |why: &str| {
            tracing::warn!("the primary offers its lease, but this node does not take it: {why}");
            Ok(None)
        };
        if !self.may_stand() {
            return refuse("it is no candidate, or about to stop");
        }
        if !self.has_applied_all(limits::HANDOFF_APPLY_WAIT).await {
            return refuse("it has not applied yet what it has received");
        }
        let confirmed = BootTime::now();
        let (holder, record) = tokio::try_join!(consul.holder(), consul.record())?;
        let held = match holder {
            Holder::Somebody(held) if held.session == session => held,
            _ => return refuse("the lease is another one by now"),
        };
        let positions = self.lineage.positions(&self.engine);
        // Before it is taken: an answer that is lost must not leave a lease that this node does not know as its own.
        self.remember_session(Some(session.to_owned())).await?;
        let index = match held.handoff_to {
            Some(to) if to == self.engine.node_id() => {
                if !record.as_ref().is_some_and(|record| record.is_met_by(&positions)) {
                    return refuse("it lacks transactions of the primary");
                }
                consul.take_up(session, held.index).await?
            }
            None if is_of_litefs(&held) && consul.renew(session).await? => {
                consul.acquire(session).await?
            }
            _ => return refuse("the offer does not stand any more"),
        };
        let Some(index) = index else { return refuse("the offer does not stand any more") };
        let own = self.lineage.standing(&self.engine);
        let term = self.field(&own, &positions, record.as_ref(), &[]).next_term();
        self.end_campaign().await;
        let (consul, session) = (consul.clone(), session.to_owned());
        Ok(Some(Tenure { consul, session, index, term, confirmed, written: None, fenced: false }))
    }
}

/// Gives back a lease that this node was offered and has not taken, if nobody else does: a LiteFS node that
/// has offered its lease does not look what becomes of it, and until its session ends nobody could lead.
async fn give_back(consul: &Consul, session: &str) {
    match consul.holder().await {
        Ok(Holder::Somebody(held)) if held.session == session && is_of_litefs(&held) => {
            tracing::info!("giving back the lease that {:?} has offered", held.primary.hostname);
            consul.release(session).await;
        }
        Ok(_) => {}
        Err(error) => {
            tracing::warn!(error = chain_text(&error), "look whose the offered lease is");
        }
    }
}

/// Whether a LiteFS node has the lease, which says nothing in Consul.
fn is_of_litefs(held: &Held) -> bool {
    held.node_id.is_none() && held.handoff_to.is_none()
}
