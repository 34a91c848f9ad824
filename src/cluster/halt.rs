//! A replica's way to its primary under HALT locks: asking for them, renewing them, sending commits,
//! giving them back. The primary's side is `http::halt`.
//!
//! Each lock has one task, from the request to the end. Invariants: a lock that was perhaps granted
//! and is not held here is given back; the database is borrowed for no longer than the primary lends
//! it, counted from before the request was sent; a transaction whose answer was lost is sent again,
//! which its position makes harmless, until its time is over.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use ltx::Pos;
use tokio::runtime::Handle;
use tokio::sync::{Notify, watch};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::boot_time::BootTime;
use crate::engine::db::{Answer, Refusal};
use crate::engine::halt::{Forward, HaltId, Outgoing};
use crate::engine::{self, Db, Engine, Role, chain_text};
use crate::http::client::{self, Client, Forwarding, HaltCall};
use crate::http::report::HaltLock;
use crate::http::security::Security;
use crate::http::{Stop, stopped};
use crate::limits;

/// The HALT locks of one node.
pub struct Halts {
    engine: Weak<Engine>,
    runtime: Handle,
    security: Security,
    /// The locks that are asked for or held.
    sessions: Mutex<HashMap<HaltId, Session>>,
    /// The way to the primary of that URL.
    forwarding: Mutex<Option<(String, Arc<Forwarding>)>>,
    /// What gives locks back.
    releases: Mutex<Vec<JoinHandle<()>>>,
}

/// One lock. Dropped, its task ends.
struct Session {
    db: Arc<Db>,
    _stop: watch::Sender<()>,
}

/// Why a HALT call came to nothing.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("no primary is known")]
    NoPrimary,
    #[error("the node stops")]
    Stopping,
    #[error(transparent)]
    Client(#[from] client::Error),
    #[error(transparent)]
    Engine(#[from] engine::Error),
    #[error("invalid halt lock: {0:?}")]
    Invalid(HaltLock),
    #[error("not granted within {} s", .0.as_secs())]
    Timeout(Duration),
    #[error("thread failed")]
    Thread(#[from] tokio::task::JoinError),
}

/// A lock that the primary has granted.
struct Grant {
    lock: HaltLock,
    /// Until when it is valid, by this node's clock.
    until: BootTime,
}

/// A lock that is held here.
struct Held {
    /// Where the database stood.
    pos: Pos,
    /// When it ends, as the primary said it last.
    expires: String,
}

impl Halts {
    /// The locks of `engine`, whose databases borrow through this from now on.
    pub fn new(engine: &Arc<Engine>, security: &Security) -> Arc<Halts> {
        let halts = Arc::new(Halts {
            engine: Arc::downgrade(engine),
            runtime: Handle::current(),
            security: security.clone(),
            sessions: Mutex::default(),
            forwarding: Mutex::default(),
            releases: Mutex::default(),
        });
        engine.shared().set_forward(Arc::new(Way(halts.clone())));
        halts
    }

    /// Gives all locks back; the mount is gone.
    pub async fn close(self: &Arc<Halts>) {
        let sessions = std::mem::take(&mut *self.sessions.lock().unwrap());
        for (id, session) in sessions {
            self.give_back(session.db.clone(), id, None);
        }
        let releases = std::mem::take(&mut *self.releases.lock().unwrap());
        let all = async {
            for release in releases {
                // It logs what goes wrong.
                let _ = release.await;
            }
        };
        if timeout(limits::HALT_STOP_WAIT, all).await.is_err() {
            tracing::warn!("halt locks were not given back in time: they expire");
        }
    }

    fn engine(&self) -> Result<Arc<Engine>, Error> {
        self.engine.upgrade().ok_or(Error::Stopping)
    }

    fn primary_url(&self) -> Result<String, Error> {
        match self.engine()?.role() {
            Role::Replica(primary) => Ok(primary.advertise_url),
            _ => Err(Error::NoPrimary),
        }
    }

    fn client(&self) -> Result<Client, Error> {
        Ok(Client::new(&self.primary_url()?, &self.security)?)
    }

    /// `POST /halt`: for a new lock, or to renew one.
    async fn ask(&self, db: &Db, id: HaltId) -> Result<Grant, Error> {
        let client = self.client()?;
        let sent = BootTime::now();
        let lock = client.halt(self.call(db, id)?).await?;
        Ok(Grant { lock, until: sent.after(limits::HALT_TTL) })
    }

    fn call<'a>(&self, db: &'a Db, id: HaltId) -> Result<HaltCall<'a>, Error> {
        let node_id = self.engine()?.node_id();
        Ok(HaltCall { db: db.name().as_str(), id: id.0, node_id })
    }

    /// Gets the lock and waits until the database stands where the primary's stands.
    async fn get(&self, db: &Db, id: HaltId) -> Result<(Grant, Pos), Error> {
        let grant = self.ask(db, id).await?;
        let pos = match grant.lock.pos.pos() {
            Some(pos) if grant.lock.id == id.0 => pos,
            _ => return Err(Error::Invalid(grant.lock)),
        };
        let moved = Arc::new(Notify::new());
        let wake = moved.clone();
        let subscription = self.engine()?.subscribe(Box::new(move || wake.notify_one()));
        while db.pos().txid < pos.txid {
            moved.notified().await;
            subscription.take();
        }
        Ok((grant, pos))
    }

    /// One lock, from the request to the end.
    async fn hold(self: Arc<Halts>, db: Arc<Db>, id: HaltId, answer: Answer, mut stop: Stop) {
        let got = tokio::select! {
            got = timeout(limits::HALT_WAIT, self.get(&db, id)) => match got {
                Ok(Ok((grant, pos))) => self.begin(&db, id, pos, grant).await,
                Ok(Err(error)) => Err(error),
                Err(_) => Err(Error::Timeout(limits::HALT_WAIT)),
            },
            () = stopped(&mut stop) => {
                self.give_back(db, id, None);
                return answer(Err(Refusal::Interrupted));
            }
        };
        let held = match got {
            Ok(held) if self.sessions.lock().unwrap().contains_key(&id) => held,
            Ok(_) => {
                self.give_back(db, id, None);
                return answer(Err(Refusal::Interrupted));
            }
            Err(error) => {
                let text = chain_text(&error);
                tracing::warn!(db = %db.name(), error = text, "acquire halt lock");
                self.sessions.lock().unwrap().remove(&id);
                self.give_back(db, id, None);
                return answer(Err(Refusal::Os(libc::EIO)));
            }
        };
        tracing::info!(db = %db.name(), %id, pos = %db.pos(), "halt lock acquired");
        answer(Ok(()));
        tokio::select! {
            () = self.keep(&db, id, held) => {}
            () = stopped(&mut stop) => {}
        }
    }

    /// From here on the database is borrowed; when the primary says that the lock ends. Not broken off
    /// half-way, so that its end comes after its beginning.
    async fn begin(&self, db: &Arc<Db>, id: HaltId, pos: Pos, grant: Grant) -> Result<Held, Error> {
        let db = db.clone();
        let until = grant.until;
        spawn_blocking(move || db.begin_borrow(id, pos, until)).await??;
        Ok(Held { pos, expires: grant.lock.expires })
    }

    /// Renews the lock until it ends. A LiteFS primary does not renew: it answers with the same end.
    async fn keep(self: &Arc<Halts>, db: &Arc<Db>, id: HaltId, held: Held) {
        let Held { pos, mut expires } = held;
        while let Some(until) = db.borrowed_until(id) {
            let left = until.since(BootTime::now());
            if left.is_zero() {
                db.end_borrow(Some(id));
                tracing::warn!(db = %db.name(), %id, "halt lock has expired: writes are refused again");
                return;
            }
            sleep(left.min(limits::HALT_RENEWAL)).await;
            if left <= limits::HALT_RENEWAL {
                continue;
            }
            match timeout(limits::HALT_RENEWAL, self.ask(db, id)).await {
                // A primary that has forgotten the lock grants another one, where it stands now.
                Ok(Ok(grant)) if ![Some(pos), Some(db.pos())].contains(&grant.lock.pos.pos()) => {
                    tracing::warn!(db = %db.name(), %id, "halt lock lost: the primary has moved on without it");
                    return self.give_back(db.clone(), id, None);
                }
                Ok(Ok(grant)) if grant.lock.expires != expires => {
                    db.extend_borrow(id, grant.until);
                    expires = grant.lock.expires;
                }
                Ok(Ok(_)) => {}
                Ok(Err(error)) => {
                    tracing::warn!(db = %db.name(), error = chain_text(&error), "renew halt lock");
                }
                Err(_) => tracing::warn!(db = %db.name(), "renew halt lock: no answer"),
            }
        }
    }

    /// Ends the borrow and tells the primary, then answers.
    fn give_back(self: &Arc<Halts>, db: Arc<Db>, id: HaltId, answer: Option<Answer>) {
        let halts = self.clone();
        let release = self.runtime.spawn(async move {
            let ending = db.clone();
            let ended = spawn_blocking(move || {
                ending.end_borrow(Some(id));
                // What is on its way may still be taken.
                ending.wait_settled();
            });
            // A thread that fails has said so.
            let _ = ended.await;
            if let Err(error) = halts.tell(&db, id).await {
                tracing::debug!(db = %db.name(), error = chain_text(&error), "release halt lock");
            }
            if let Some(answer) = answer {
                answer(Ok(()));
            }
        });
        let mut releases = self.releases.lock().unwrap();
        releases.retain(|release| !release.is_finished());
        releases.push(release);
    }

    async fn tell(&self, db: &Db, id: HaltId) -> Result<(), Error> {
        let client = self.client()?;
        Ok(client.unhalt(self.call(db, id)?).await?)
    }

    fn forwarding(&self) -> Result<Arc<Forwarding>, Error> {
        let url = self.primary_url()?;
        let mut forwarding = self.forwarding.lock().unwrap();
        if let Some((to, way)) = &*forwarding
            && *to == url
        {
            return Ok(way.clone());
        }
        let way = Arc::new(Forwarding::new(Client::new(&url, &self.security)?));
        *forwarding = Some((url, way.clone()));
        Ok(way)
    }

    /// Sends a transaction until the primary has it, or will not have it, or its time is over.
    async fn send(&self, db: &Db, outgoing: &Outgoing) -> Result<(), Error> {
        let end = Instant::now() + limits::FORWARD_WAIT;
        let mut pause = limits::FORWARD_RETRY;
        loop {
            let (forwarding, call) = (self.forwarding()?, self.call(db, outgoing.id)?);
            let sent = forwarding.send(call, outgoing.pos, &outgoing.ltx);
            let error = match timeout_at(end, sent).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(error)) => error,
                Err(_) => return Err(Error::Timeout(limits::FORWARD_WAIT)),
            };
            let is_answer = matches!(error, client::Error::Response { .. });
            if is_answer
                || Instant::now() + pause >= end
                || db.borrowed_until(outgoing.id).is_none()
            {
                return Err(error.into());
            }
            tracing::debug!(db = %db.name(), error = chain_text(&error), "send transaction again");
            sleep(pause).await;
            pause *= 2;
        }
    }
}

/// The way that the engine takes.
struct Way(Arc<Halts>);

impl Forward for Way {
    fn acquire(&self, db: Arc<Db>, id: HaltId, answer: Answer) {
        let (stop, stopping) = watch::channel(());
        let session = Session { db: db.clone(), _stop: stop };
        self.0.sessions.lock().unwrap().insert(id, session);
        self.0.runtime.spawn(self.0.clone().hold(db, id, answer, stopping));
    }

    fn cancel(&self, id: HaltId) -> bool {
        self.0.sessions.lock().unwrap().remove(&id).is_some()
    }

    fn release(&self, db: Arc<Db>, id: HaltId, answer: Answer) {
        self.cancel(id);
        self.0.give_back(db, id, Some(answer));
    }

    fn commit(&self, db: Arc<Db>, outgoing: Outgoing, answer: Answer) {
        let halts = self.0.clone();
        self.0.runtime.spawn(async move {
            let sent = halts.send(&db, &outgoing).await;
            if let Err(error) = &sent {
                let text = chain_text(error);
                tracing::warn!(db = %db.name(), error = text, "commit failed: the primary has not taken the transaction");
            }
            let result = sent.map_err(|_| Refusal::Os(libc::EIO));
            // What is left to do writes files.
            let _ = spawn_blocking(move || answer(result)).await;
        });
    }
}
