//! The primary's side of HALT locks on the wire: lend one, take it back, take a transaction of its
//! holder.
//!
//! ```text
//! POST   /halt?name=DB&id=N      {"id":N,"pos":{...},"expires":"..."}; again: renewed
//! DELETE /halt?name=DB&id=N      nothing
//! POST   /tx?name=DB&lockID=N    body: one LTX file; pos=TXID/CHECKSUM may say where it leads
//! ```
//!
//! Invariants: a transaction is received in full before the database is locked for it, only from who
//! holds a valid lock, and answered with success only when it is durable; a lock ends by a timer of
//! its own, and never while a transaction is being applied under it.

use std::io::{self, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use bytes::Bytes;
use hyper::body::{Body, Incoming};
use hyper::{Method, Request, StatusCode};
use ltx::{NodeId, Pos};
use tokio::sync::oneshot;
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};

use super::body;
use super::query::parameter;
use super::report::{HaltLock, HaltPos};
use super::rfc3339::rfc3339_nanos;
use super::server::{Answer, Api, Refusal, TEXT, peer_id, required_name, respond};
use crate::boot_time::BootTime;
use crate::engine::halt::HaltId;
use crate::engine::halt::lent::{Lent, Loan};
use crate::engine::{self, Db, DbName, Receiver, chain_text};
use crate::limits;

/// What both routes of `/halt` are asked.
pub(super) struct Call {
    pub(super) name: String,
    pub(super) id: HaltId,
}

impl Call {
    /// What `request` asks the node `own`.
    pub(super) fn of<B>(
        own: NodeId,
        request: &Request<B>,
        parameter_of_id: &str,
    ) -> Result<Call, Refusal> {
        let id = parameter(request.uri().query(), parameter_of_id);
        let invalid = || refuse(StatusCode::BAD_REQUEST, &format!("invalid id: {id:?}"));
        let id = id.parse().map_err(|_| invalid())?;
        if peer_id(request.headers()) == own {
            let un = if request.method() == Method::DELETE { "un" } else { "" };
            return Err(refuse(StatusCode::BAD_REQUEST, &format!("cannot remotely {un}halt self")));
        }
        Ok(Call { name: required_name(request)?, id: HaltId(id) })
    }
}

fn refuse(status: StatusCode, text: &str) -> Refusal {
    Refusal::new(status, text)
}

fn not_found(name: &str) -> Refusal {
    refuse(StatusCode::NOT_FOUND, &format!("database not found: {name:?}"))
}

/// `POST /halt`
pub(super) async fn lend(api: Arc<Api>, request: Request<Incoming>) -> Answer {
    let Call { name, id } = Call::of(api.engine.node_id(), &request, "id")?;
    let failed = |text: &str| {
        refuse(StatusCode::INTERNAL_SERVER_ERROR, &format!("acquire halt lock: {text}"))
    };
    if id.0 == 0 {
        return Err(failed("halt lock id required"));
    }
    let bad_name = |error: engine::InvalidName| refuse(StatusCode::BAD_REQUEST, &error.to_string());
    let name = DbName::new(&name).map_err(bad_name)?;
    api.primaryship()?;
    let slots = api.halt_slots.clone();
    let slot = timeout(limits::HALT_WAIT, slots.acquire_owned()).await;
    let slot = slot.ok().and_then(Result::ok).ok_or_else(|| failed("context deadline exceeded"))?;
    let abandoned = Abandoned::default();
    let (engine, is_abandoned) = (api.engine.clone(), abandoned.0.clone());
    let peer = peer_id(request.headers());
    let lent = spawn_blocking(move || {
        let _slot = slot;
        let db = engine.database_or_new(&name)?;
        let lent = db.lend(id, limits::HALT_WAIT, &is_abandoned)?;
        if let Lent::New(loan) = lent {
            tracing::info!(db = %name, %id, pos = %loan.pos, %peer, "halt lock granted");
            // Here, because who asked may be gone.
            tokio::spawn(expire(db, id, loan.until));
        }
        Ok(lent.loan())
    });
    let loan =
        lent.await.map_err(|error| Refusal::internal(&error))?.map_err(|error| match error {
            engine::Error::NotPrimary => super::server::lease_expired(),
            engine::Error::Busy { .. } => failed("context deadline exceeded"),
            error => failed(&chain_text(&error)),
        })?;
    Ok(respond(TEXT, body::full(json(&loan))))
}

/// Tells the thread that waits for the lock, when it is dropped, that nobody wants it any more: so
/// ends a request whose peer is gone.
#[derive(Default)]
struct Abandoned(Arc<AtomicBool>);

impl Drop for Abandoned {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

fn json(loan: &Loan) -> String {
    let left = loan.until.since(BootTime::now());
    let lock = HaltLock {
        id: loan.id.0,
        pos: HaltPos::new(loan.pos),
        expires: rfc3339_nanos(SystemTime::now() + left),
    };
    serde_json::to_string(&lock).expect("texts and numbers encode") + "\n"
}

/// Ends the lock `id` when it is not renewed in time.
async fn expire(db: Arc<Db>, id: HaltId, mut until: BootTime) {
    loop {
        sleep(until.since(BootTime::now())).await;
        let expiring = db.clone();
        match spawn_blocking(move || expiring.expire_lent(id)).await {
            Ok(Some(later)) => until = later,
            _ => return,
        }
    }
}

/// `DELETE /halt`
pub(super) async fn take_back(api: Arc<Api>, request: Request<Incoming>) -> Answer {
    let Call { name, id } = Call::of(api.engine.node_id(), &request, "id")?;
    let db = api.engine.database(&name).ok_or_else(|| not_found(&name))?;
    let ended = spawn_blocking(move || db.take_back(Some(id), "released")).await;
    ended.map_err(|error| Refusal::internal(&error))?;
    Ok(respond(TEXT, body::empty()))
}

/// `POST /tx`
pub(super) async fn take(api: Arc<Api>, request: Request<Incoming>) -> Answer {
    let Call { name, id } = Call::of(api.engine.node_id(), &request, "lockID")?;
    let primaryship = api.primaryship()?;
    let db = api.engine.database(&name).ok_or_else(|| not_found(&name))?;
    let pos = parameter(request.uri().query(), "pos").parse().ok();
    if let Some(pos) = pos.filter(|pos| db.is_committed_at(*pos)) {
        // Its answer was lost.
        durable(&db, pos).await?;
        return Ok(respond(TEXT, body::empty()));
    }
    let receiver = api.engine.receive(db.name()).map_err(tx_refusal)?;
    let taken = async {
        let loan = db.loan(id).ok_or_else(|| not_held(&db))?;
        let slot = api.forward_slots.acquire().await;
        let receiver = tokio::select! {
            received = receive(&db, receiver, request.into_body()) => received?,
            () = lock_ended(&db, id, loan.until) => return Err(not_held(&db)),
        };
        drop(slot);
        let pos = spawn_blocking(move || receiver.finish_forwarded(id));
        pos.await.map_err(|error| Refusal::internal(&error))?.map_err(tx_refusal)
    };
    let pos = tokio::select! {
        pos = taken => pos?,
        () = api.primary_lost(primaryship) => return Err(super::server::lease_expired()),
    };
    durable(&db, pos).await?;
    Ok(respond(TEXT, body::empty()))
}

fn not_held(db: &Db) -> Refusal {
    refuse(StatusCode::CONFLICT, &format!("halt lock on {:?} is not held", db.name().as_str()))
}

/// Waits until the lock `id`, valid until `until`, is valid no more.
async fn lock_ended(db: &Db, id: HaltId, mut until: BootTime) {
    loop {
        sleep(until.since(BootTime::now())).await;
        match db.loan(id) {
            Some(loan) => until = loan.until,
            None => return,
        }
    }
}

/// Takes the body, of any length that the disk has room for.
pub(super) async fn receive<B>(
    db: &Db,
    mut receiver: Receiver,
    mut body: B,
) -> Result<Receiver, Refusal>
where
    B: Body<Data = Bytes, Error: std::error::Error> + Unpin,
{
    let broken = |text: String| refuse(StatusCode::BAD_REQUEST, &format!("write ltx file: {text}"));
    let mut block = Vec::new();
    loop {
        let data = body::next_data(&mut body).await.map_err(broken)?;
        block.extend_from_slice(data.as_deref().unwrap_or_default());
        if block.len() >= limits::BODY_PIECE_BYTES || data.is_none() {
            if db.is_disk_full() {
                let full = io::Error::from(io::ErrorKind::StorageFull);
                return Err(write_refusal(&full));
            }
            let written = spawn_blocking(move || {
                receiver.write_all(&block).map(|()| {
                    block.clear();
                    (receiver, block)
                })
            });
            let written = written.await.map_err(|error| Refusal::internal(&error))?;
            (receiver, block) = written.map_err(|error| write_refusal(&error))?;
        }
        if data.is_none() {
            return Ok(receiver);
        }
    }
}

fn write_refusal(error: &io::Error) -> Refusal {
    let status = match error.kind() {
        io::ErrorKind::StorageFull => StatusCode::INSUFFICIENT_STORAGE,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    };
    refuse(status, &format!("write ltx file: {error}"))
}

/// What is wrong with the file is the sender's; that it could not be applied is ours.
fn tx_refusal(error: engine::Error) -> Refusal {
    use engine::Error;
    let (status, what) = match &error {
        Error::NotPrimary => return super::server::lease_expired(),
        Error::HaltLock { .. } => return refuse(StatusCode::CONFLICT, &chain_text(&error)),
        Error::PositionMismatch { .. } => (StatusCode::CONFLICT, "write ltx file"),
        Error::Ltx { .. } | Error::Diverged { .. } | Error::NoDatabase { .. } => {
            (StatusCode::BAD_REQUEST, "write ltx file")
        }
        Error::Busy { .. } => (StatusCode::SERVICE_UNAVAILABLE, "cannot apply ltx"),
        _ => (StatusCode::INTERNAL_SERVER_ERROR, "cannot apply ltx"),
    };
    refuse(status, &format!("{what}: {}", chain_text(&error)))
}

/// Waits until the transaction is durable here.
async fn durable(db: &Db, pos: Pos) -> Result<(), Refusal> {
    let (sender, done) = oneshot::channel::<Result<(), String>>();
    db.when_durable(
        pos.txid,
        Box::new(move |result| {
            // Nobody waits any more, if the peer is gone.
            let _ = sender.send(result);
        }),
    );
    let failed = |text: &str| {
        refuse(StatusCode::INTERNAL_SERVER_ERROR, &format!("cannot apply ltx: {text}"))
    };
    match done.await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(text)) => Err(failed(&text)),
        Err(_) => Err(failed("the node stops")),
    }
}
