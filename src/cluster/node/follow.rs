//! Being a replica: from a primary that was found to the end of its stream, or to its lease.

use super::lead::Lease;
use super::{Error, Leader, Node, Then};
use crate::cluster::replica::{self, End, Progress, Replica};
use crate::engine::{PrimaryInfo, Role, chain_text};
use crate::http::Stop;

impl Node {
    /// Follows a primary until its stream ends. The role stays: as long as the lease names this
    /// primary, writes belong there, reachable or not.
    pub(super) async fn follow(&mut self, leader: Leader, stop: &mut Stop) -> Result<Then, Error> {
        let Leader { primary, node_id } = leader;
        let PrimaryInfo { hostname, advertise_url } = &primary;
        let id = self.engine.node_id();
        self.reports.info(
            &format!("found {advertise_url}"),
            format_args!(
                "{id}: existing primary found ({hostname}), connecting as replica to {advertise_url:?}"
            ),
        );
        self.set_role(Role::Replica(primary.clone())).await?;
        self.last_primary = Some(primary.clone());
        let (ended, progress) = self.replicate(&primary, stop).await;
        if progress.is_connected() {
            self.campaign.met(node_id);
        }
        if progress.is_ready() {
            self.backoff.reset();
            self.reports.clear();
        }
        match ended {
            Ok(End::Stopped) => Ok(Then::Stop),
            Ok(End::Superseded) => Ok(Then::Again),
            Ok(End::Closed) => {
                tracing::info!("{id}: disconnected from primary");
                // It has ended cleanly, so another one may have the lease already.
                Ok(if progress.is_ready() { Then::Again } else { Then::Pause })
            }
            Ok(End::Handoff { lease_id }) => match self.take_offer(&lease_id).await? {
                Some(tenure) => self.lead(Lease::Consul(tenure), stop).await,
                None => Ok(Then::Again),
            },
            Err(error) => {
                match error.is_port_closed() {
                    true => self.campaign.refused(node_id),
                    false => self.campaign.answered(),
                }
                let text = chain_text(&error);
                // A primary that is away is tried many times.
                self.reports.warn(&text, format_args!("{id}: disconnected from primary: {text}"));
                Ok(Then::Pause)
            }
        }
    }

    /// Runs one connection, and does meanwhile what is asked of this node.
    async fn replicate(
        &mut self,
        primary: &PrimaryInfo,
        stop: &mut Stop,
    ) -> (Result<End, replica::Error>, Progress) {
        let (engine, lineage, identity) =
            (self.engine.clone(), self.lineage.clone(), self.identity.clone());
        let (databases, security) = (self.options.databases.clone(), self.options.security.clone());
        let (ready, link, reconnect) =
            (self.ready.clone(), self.link.clone(), self.reconnect.clone());
        let progress = Progress::default();
        let replica = Replica {
            engine: &engine,
            identity: &identity,
            security: &security,
            primary,
            view: self.view(),
            lineage: &lineage,
            databases: &databases,
            ready: &ready,
            link: &link,
            reconnect: &reconnect,
            progress: &progress,
        };
        let run = replica.run(stop);
        tokio::pin!(run);
        let ended = loop {
            tokio::select! {
                ended = &mut run => break ended,
                Some(command) = self.commands.recv() => {
                    self.command_without_lease(command);
                }
            }
        };
        (ended, progress.clone())
    }
}
