//! The calls to Consul's HTTP API that a lease needs: keys, sessions, transactions.
//!
//! HTTP/1.1, with TLS for `https`; connections are kept. Invariants: each call ends within the limit
//! that its caller gives; an answer is bounded by [`limits::DOCUMENT_BYTES_MAX`]; no error and no log
//! line shows a token.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use hyper::{Method, Request, StatusCode};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client as Pool;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use rustls::ClientConfig;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::address::{Address, Certificates};
use crate::limits;
use crate::tls::{self, Trust};

/// The header with the index for blocking queries.
const INDEX: &str = "x-consul-index";
/// The header with the token.
const TOKEN: &str = "x-consul-token";

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No connection, or it broke.
    #[error("consul at {address} cannot be reached ({what})")]
    Unreachable {
        /// Its URL.
        address: String,
        /// What was being done.
        what: &'static str,
        /// Why.
        source: Cause,
    },
    /// No answer in time.
    #[error("consul at {address} does not answer within {wait:?} ({what})")]
    Silence {
        /// Its URL.
        address: String,
        /// What was being done.
        what: &'static str,
        /// For how long.
        wait: Duration,
    },
    /// An answer that says no.
    #[error("consul at {address} refused to {what}: {code} {text}")]
    Refused {
        /// Its URL.
        address: String,
        /// What was being done.
        what: &'static str,
        /// The status code.
        code: u16,
        /// The first line of the answer.
        text: String,
    },
    /// An answer that is not what it should be.
    #[error("consul at {address} gave an answer that makes no sense ({what})")]
    Answer {
        /// Its URL.
        address: String,
        /// What was being done.
        what: &'static str,
        /// Why.
        source: Cause,
    },
}

/// Which state a read sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consistency {
    /// The newest, confirmed by a majority of the servers.
    Consistent,
    /// What the leader has, which is enough to look around.
    Default,
}

/// A key with its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub key: String,
    /// Its value; empty where Consul says null.
    pub value: Vec<u8>,
    /// The session that has it locked.
    pub session: Option<String>,
    /// Grows with each change of the key.
    pub index: u64,
}

/// What a session is created with.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct NewSession<'a> {
    /// What happens to the keys that it has locked when it ends.
    pub behavior: &'static str,
    /// For how long nobody can lock them afterwards.
    pub lock_delay: String,
    /// For people.
    pub name: &'static str,
    /// The node of the catalogue that it belongs to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<&'a str>,
    /// The health checks that it depends on.
    pub node_checks: [&'static str; 0],
    /// For how long it lives unrenewed.
    #[serde(rename = "TTL")]
    pub ttl: String,
}

/// Whether a session was there to be renewed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Renewed {
    /// It lives on.
    Yes,
    /// There is no such session.
    Gone,
}

/// One step of a transaction.
#[derive(Debug)]
pub enum Step<'a> {
    /// The key was not changed since it had this index.
    CheckIndex(&'a str, u64),
    /// The key is locked by this session.
    CheckSession(&'a str, &'a str),
    /// Sets a key.
    Set(&'a str, &'a [u8]),
    /// Locks a key for a session and sets it.
    Lock(&'a str, &'a str, &'a [u8]),
    /// Gives a key up that is locked by this session, and empties it.
    Unlock(&'a str, &'a str),
}

/// What became of a transaction.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All steps were taken; the index of the last one's key.
    Done(u64),
    /// None was; why.
    Refused(String),
}

/// A client of one agent.
pub struct Client {
    address: Address,
    headers: HeaderMap,
    pool: Pool<HttpsConnector<HttpConnector>, Full<Bytes>>,
}

/// Why something below a call failed.
type Cause = Box<dyn std::error::Error + Send + Sync>;

/// One call.
struct Call<'a> {
    what: &'static str,
    method: Method,
    path: &'a str,
    /// With its leading `?` or `&`; empty for none.
    query: String,
    body: Vec<u8>,
    wait: Duration,
}

/// An answer, whatever its status.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) index: u64,
    pub(super) body: Bytes,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RawEntry {
    key: String,
    value: Option<String>,
    session: Option<String>,
    modify_index: u64,
}

impl Client {
    /// A client for `address`; no call is made.
    ///
    /// # Errors
    /// Certificates that cannot be read or used.
    pub fn new(address: Address) -> Result<Client, tls::Error> {
        let mut http = HttpConnector::new();
        http.enforce_http(false);
        http.set_nodelay(true);
        http.set_connect_timeout(Some(limits::CONNECT_WAIT));
        let config = tls_config(&address.certificates, address.scheme)?;
        let connector = HttpsConnectorBuilder::new().with_tls_config(config).https_or_http();
        let connector = connector.enable_http1().wrap_connector(http);
        let mut builder = Pool::builder(TokioExecutor::new());
        builder.pool_timer(TokioTimer::new()).pool_idle_timeout(limits::CONSUL_IDLE);
        let headers = headers(&address);
        Ok(Client { pool: builder.build(connector), headers, address })
    }

    /// Where it calls.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// A key, if it exists.
    pub async fn read(
        &self,
        key: &str,
        consistency: Consistency,
        wait: Duration,
    ) -> Result<Option<Entry>, Error> {
        let query = match consistency {
            Consistency::Consistent => "?consistent",
            Consistency::Default => "",
        };
        let path = key_path(key);
        let answer = self.get("read a key", &path, query.to_owned(), wait).await?;
        Ok(self.entries("read a key", answer)?.pop())
    }

    /// All keys that begin with `prefix`, as a majority of the servers has them.
    pub async fn list(&self, prefix: &str, wait: Duration) -> Result<Vec<Entry>, Error> {
        let query = "?recurse&consistent".to_owned();
        let answer = self.get("list keys", &key_path(prefix), query, wait).await?;
        self.entries("list keys", answer)
    }

    /// Waits until `key` is not what it was at `index`, for `wait` at the most; how it is then, and
    /// the index of that.
    pub async fn watch(
        &self,
        key: &str,
        index: u64,
        wait: Duration,
    ) -> Result<(u64, Option<Entry>), Error> {
        let query = format!("?index={index}&wait={}ms", wait.as_millis());
        // Consul adds up to a sixteenth, so that not all who wait return together.
        let limit = wait + wait / 8 + limits::CONSUL_WAIT;
        let answer = self.get("watch a key", &key_path(key), query, limit).await?;
        let now = answer.index;
        Ok((now, self.entries("watch a key", answer)?.pop()))
    }

    /// Makes a key; whether there was none.
    pub async fn create(&self, key: &str, value: &[u8], wait: Duration) -> Result<bool, Error> {
        self.put_key("create a key", key, "?cas=0", value, wait).await
    }

    /// Locks a key for a session and sets it; `false` if it is locked or must not be for a while.
    pub async fn acquire(
        &self,
        key: &str,
        session: &str,
        value: &[u8],
        wait: Duration,
    ) -> Result<bool, Error> {
        let query = format!("?acquire={}", escape(session, b""));
        self.put_key("acquire the lease", key, &query, value, wait).await
    }

    /// Gives a key up that a session has locked, and empties it; whether the session had it.
    pub async fn release(&self, key: &str, session: &str, wait: Duration) -> Result<bool, Error> {
        let query = format!("?release={}", escape(session, b""));
        self.put_key("release the lease", key, &query, &[], wait).await
    }

    /// Removes a key.
    pub async fn delete(&self, key: &str, wait: Duration) -> Result<(), Error> {
        let what = "delete a key";
        let path = key_path(key);
        let (query, body) = (String::new(), Vec::new());
        let call = Call { what, method: Method::DELETE, path: &path, query, body, wait };
        let answer = self.call(call).await?;
        self.expect_ok(what, answer).map(|_| ())
    }

    /// Takes all steps together or none.
    pub async fn transact(&self, steps: &[Step<'_>], wait: Duration) -> Result<Outcome, Error> {
        let what = "change keys together";
        let steps: Vec<_> = steps.iter().map(Step::json).collect();
        let body = serde_json::to_vec(&steps).expect("plain texts and numbers encode");
        self.outcome(what, self.put(what, "/v1/txn", String::new(), body, wait).await?)
    }

    /// What the answer to a transaction says.
    pub(super) fn outcome(&self, what: &'static str, answer: Answer) -> Result<Outcome, Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Results {
            #[serde(default)]
            results: Option<Vec<Result_>>,
            #[serde(default)]
            errors: Option<Vec<Failure>>,
        }
        #[derive(Deserialize)]
        struct Result_ {
            #[serde(rename = "KV")]
            kv: RawEntry,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Failure {
            what: String,
        }
        if answer.status != StatusCode::CONFLICT {
            let answer = self.expect_ok(what, answer)?;
            let results: Results = self.decode(what, &answer.body)?;
            let last = results.results.unwrap_or_default().pop();
            return Ok(Outcome::Done(last.map_or(0, |last| last.kv.modify_index)));
        }
        let results: Results = self.decode(what, &answer.body)?;
        let why = results.errors.unwrap_or_default().into_iter().map(|error| error.what);
        Ok(Outcome::Refused(why.collect::<Vec<_>>().join("; ")))
    }

    /// Makes a session; its id.
    pub async fn create_session(
        &self,
        session: &NewSession<'_>,
        wait: Duration,
    ) -> Result<String, Error> {
        let what = "create a session";
        let body = serde_json::to_vec(session).expect("plain texts encode");
        self.session(what, self.put(what, "/v1/session/create", String::new(), body, wait).await?)
    }

    /// The id in the answer to a new session.
    pub(super) fn session(&self, what: &'static str, answer: Answer) -> Result<String, Error> {
        #[derive(Deserialize)]
        struct Created {
            #[serde(rename = "ID")]
            id: String,
        }
        let answer = self.expect_ok(what, answer)?;
        Ok(self.decode::<Created>(what, &answer.body)?.id)
    }

    /// Lets a session live for another TTL.
    pub async fn renew(&self, session: &str, wait: Duration) -> Result<Renewed, Error> {
        let what = "renew the session";
        let path = format!("/v1/session/renew/{}", escape(session, b""));
        self.renewed(what, self.put(what, &path, String::new(), Vec::new(), wait).await?)
    }

    /// What the answer to a renewal says.
    pub(super) fn renewed(&self, what: &'static str, answer: Answer) -> Result<Renewed, Error> {
        if answer.status == StatusCode::NOT_FOUND {
            return Ok(Renewed::Gone);
        }
        let answer = self.expect_ok(what, answer)?;
        let sessions: Option<Vec<serde_json::Value>> = self.decode(what, &answer.body)?;
        Ok(if sessions.is_some_and(|list| !list.is_empty()) { Renewed::Yes } else { Renewed::Gone })
    }

    /// Ends a session; the keys that it has locked are dealt with as it was created with. One that
    /// is gone already is fine.
    pub async fn destroy_session(&self, session: &str, wait: Duration) -> Result<(), Error> {
        let what = "end a session";
        let path = format!("/v1/session/destroy/{}", escape(session, b""));
        let answer = self.put(what, &path, String::new(), Vec::new(), wait).await?;
        self.expect_ok(what, answer).map(|_| ())
    }

    /// Makes sure that the catalogue has a node of that name.
    pub async fn register_node(&self, node: &str, wait: Duration) -> Result<(), Error> {
        let what = "register a node";
        let body = serde_json::json!({ "Node": node, "Address": "localhost" }).to_string();
        let path = "/v1/catalog/register";
        let answer = self.put(what, path, String::new(), body.into(), wait).await?;
        self.expect_ok(what, answer).map(|_| ())
    }

    async fn get(
        &self,
        what: &'static str,
        path: &str,
        query: String,
        wait: Duration,
    ) -> Result<Answer, Error> {
        self.call(Call { what, method: Method::GET, path, query, body: Vec::new(), wait }).await
    }

    async fn put(
        &self,
        what: &'static str,
        path: &str,
        query: String,
        body: Vec<u8>,
        wait: Duration,
    ) -> Result<Answer, Error> {
        self.call(Call { what, method: Method::PUT, path, query, body, wait }).await
    }

    async fn put_key(
        &self,
        what: &'static str,
        key: &str,
        query: &str,
        value: &[u8],
        wait: Duration,
    ) -> Result<bool, Error> {
        let answer = self.put(what, &key_path(key), query.to_owned(), value.to_vec(), wait).await?;
        let answer = self.expect_ok(what, answer)?;
        self.decode(what, &answer.body)
    }

    async fn call(&self, call: Call<'_>) -> Result<Answer, Error> {
        let Call { what, wait, .. } = call;
        let address = || self.address.to_string();
        let unreachable = |source| Error::Unreachable { address: address(), what, source };
        let request = self.request(call);
        let exchange = async {
            let response = self.pool.request(request).await?;
            let (head, body) = response.into_parts();
            let body = Limited::new(body, limits::DOCUMENT_BYTES_MAX).collect().await?;
            let index = head.headers.get(INDEX).and_then(|index| index.to_str().ok());
            let index = index.and_then(|index| index.parse().ok()).unwrap_or_default();
            Ok::<_, Cause>(Answer { status: head.status, index, body: body.to_bytes() })
        };
        match timeout(wait, exchange).await {
            Ok(answer) => answer.map_err(unreachable),
            Err(_) => Err(Error::Silence { address: address(), what, wait }),
        }
    }

    fn request(&self, call: Call<'_>) -> Request<Full<Bytes>> {
        let Address { scheme, authority, namespace, .. } = &self.address;
        let mut query = call.query;
        if let Some(namespace) = namespace {
            query += if query.is_empty() { "?ns=" } else { "&ns=" };
            query += &escape(namespace, b"");
        }
        let mut request = Request::new(Full::new(call.body.into()));
        *request.method_mut() = call.method;
        let uri = format!("{scheme}://{authority}{}{query}", call.path);
        *request.uri_mut() = uri.parse().expect("each part was checked or escaped");
        *request.headers_mut() = self.headers.clone();
        request
    }

    fn expect_ok(&self, what: &'static str, answer: Answer) -> Result<Answer, Error> {
        if answer.status == StatusCode::OK {
            return Ok(answer);
        }
        let text = String::from_utf8_lossy(&answer.body);
        let text = text.lines().next().unwrap_or_default().chars().take(300).collect();
        let address = self.address.to_string();
        Err(Error::Refused { address, what, code: answer.status.as_u16(), text })
    }

    pub(super) fn decode<T: DeserializeOwned>(
        &self,
        what: &'static str,
        body: &[u8],
    ) -> Result<T, Error> {
        serde_json::from_slice(body).map_err(|error| self.nonsense(what, error))
    }

    /// The keys in an answer; none where it says that there are none.
    pub(super) fn entries(&self, what: &'static str, answer: Answer) -> Result<Vec<Entry>, Error> {
        if answer.status == StatusCode::NOT_FOUND {
            return Ok(Vec::new());
        }
        let answer = self.expect_ok(what, answer)?;
        let raw: Vec<RawEntry> = self.decode(what, &answer.body)?;
        let entry = |raw: RawEntry| {
            let value = BASE64.decode(raw.value.unwrap_or_default());
            let value = value.map_err(|error| self.nonsense(what, error))?;
            let session = raw.session.filter(|session| !session.is_empty());
            Ok(Entry { key: raw.key, value, session, index: raw.modify_index })
        };
        raw.into_iter().map(entry).collect()
    }

    fn nonsense(&self, what: &'static str, source: impl Into<Cause>) -> Error {
        Error::Answer { address: self.address.to_string(), what, source: source.into() }
    }
}

impl Step<'_> {
    fn json(&self) -> serde_json::Value {
        use serde_json::json;
        let kv = match self {
            Step::CheckIndex(key, index) => {
                json!({ "Verb": "check-index", "Key": key, "Index": index })
            }
            Step::CheckSession(key, session) => {
                json!({ "Verb": "check-session", "Key": key, "Session": session })
            }
            Step::Set(key, value) => {
                json!({ "Verb": "set", "Key": key, "Value": BASE64.encode(value) })
            }
            Step::Lock(key, session, value) => {
                let value = BASE64.encode(value);
                json!({ "Verb": "lock", "Key": key, "Session": session, "Value": value })
            }
            Step::Unlock(key, session) => {
                json!({ "Verb": "unlock", "Key": key, "Session": session })
            }
        };
        json!({ "KV": kv })
    }
}

fn headers(address: &Address) -> HeaderMap {
    let mut headers = HeaderMap::new();
    let mut insert = |name: hyper::header::HeaderName, value: String| {
        // What is no header value was refused, or is base64.
        if let Ok(mut value) = HeaderValue::from_str(&value) {
            value.set_sensitive(true);
            headers.insert(name, value);
        }
    };
    if let Some(token) = &address.token {
        insert(hyper::header::HeaderName::from_static(TOKEN), token.reveal().to_owned());
    }
    if let Some(login) = &address.login {
        insert(AUTHORIZATION, format!("Basic {}", BASE64.encode(login.reveal())));
    }
    headers
}

/// The path of a key in the API.
fn key_path(key: &str) -> String {
    format!("/v1/kv/{}", escape(key, b"/"))
}

/// `text` as a part of a URL, in which the bytes of `keep` stay too.
fn escape(text: &str, keep: &[u8]) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) || keep.contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    escaped
}

fn tls_config(files: &Certificates, scheme: &str) -> Result<ClientConfig, tls::Error> {
    let trust = match &files.roots {
        _ if scheme != "https" => return tls::client(Trust::Nobody, None),
        Some(path) => Trust::File(path),
        None => Trust::Machine,
    };
    tls::client(trust, files.client.as_ref())
}
