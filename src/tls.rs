//! Certificates in files (PEM), and what TLS is set up with. TLS 1.2 and 1.3.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};

/// Why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file has no certificate, or no key, that can be used.
    #[error("read certificate {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: pem::Error,
    },
    /// The machine trusts nobody, and no file says whom to trust.
    #[error("find the certificate authorities that this machine trusts; name one in a file")]
    NoRoots,
    /// Certificate and key do not fit, or the library refuses them.
    #[error("set up TLS")]
    Config(#[from] rustls::Error),
    /// The authorities for the certificates of clients cannot be used.
    #[error("set up TLS for clients with certificates")]
    Verifier(#[from] VerifierBuilderError),
}

/// A certificate, with those up to its authority, and its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The file with the certificates, the own one first.
    pub certificate: PathBuf,
    /// The file with the key.
    pub key: PathBuf,
}

/// Whom a client trusts.
#[derive(Debug, Clone, Copy)]
pub enum Trust<'a> {
    /// Who is certified by an authority of this file.
    File(&'a Path),
    /// Who is certified by an authority that the machine trusts.
    Machine,
    /// Nobody.
    Nobody,
}

/// For connections to others, with a certificate of our own if there is one.
pub fn client(trust: Trust<'_>, identity: Option<&Identity>) -> Result<ClientConfig, Error> {
    let builder =
        ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
    let builder = builder.with_root_certificates(match trust {
        Trust::File(path) => authorities(path)?,
        Trust::Machine => machine_authorities()?,
        Trust::Nobody => RootCertStore::empty(),
    });
    match identity {
        None => Ok(builder.with_no_client_auth()),
        Some(identity) => {
            let (certificates, key) = identity.read()?;
            Ok(builder.with_client_auth_cert(certificates, key)?)
        }
    }
}

/// For connections of others. With `clients`, only from those that have a certificate of an authority in
/// that file.
pub fn server(identity: &Identity, clients: Option<&Path>) -> Result<ServerConfig, Error> {
    let builder =
        ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
    let builder = match clients {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let roots = Arc::new(authorities(path)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider());
            builder.with_client_cert_verifier(verifier.build()?)
        }
    };
    let (certificates, key) = identity.read()?;
    Ok(builder.with_single_cert(certificates, key)?)
}

impl Identity {
    fn read(&self) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), Error> {
        let key = PrivateKeyDer::from_pem_file(&self.key)
            .map_err(|source| Error::File { path: self.key.clone(), source })?;
        Ok((certificates(&self.certificate)?, key))
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn authorities(path: &Path) -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate)?;
    }
    Ok(roots)
}

fn machine_authorities() -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs().certs;
    match roots.add_parsable_certificates(found) {
        (0, _) => Err(Error::NoRoots),
        _ => Ok(roots),
    }
}

/// The certificates in a file; there is at least one.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let error = |source| Error::File { path: path.to_owned(), source };
    let file = File::open(path).map_err(|source| error(pem::Error::Io(source)))?;
    let found = CertificateDer::pem_reader_iter(io::BufReader::new(file));
    let found: Vec<_> = found.collect::<Result<_, _>>().map_err(error)?;
    if found.is_empty() { Err(error(pem::Error::NoItemsFound)) } else { Ok(found) }
}
