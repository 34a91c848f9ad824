//! Certificates for nodes on this machine, and a token.

use std::fs;
use std::path::PathBuf;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair,
};

/// A token for `http.auth-token`.
pub const TOKEN: &str = "a-token-that-nobody-guesses";

/// An authority, and what it certified for 127.0.0.1.
pub struct Certificates {
    dir: tempfile::TempDir,
}

impl Certificates {
    /// New ones.
    pub fn new() -> Certificates {
        let dir = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let authority = CertifiedIssuer::self_signed(params, key).unwrap();
        let names = ["127.0.0.1".to_owned(), "localhost".to_owned()];
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name.push(DnType::CommonName, "node");
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &authority).unwrap();
        let write = |name: &str, text: String| fs::write(dir.path().join(name), text).unwrap();
        write("ca", authority.pem());
        write("cert", certificate.pem());
        write("key", key.serialize_pem());
        Certificates { dir }
    }

    /// `ca`, `cert` or `key`.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The keys of the section `http` for a node with all of this, with a leading comma.
    pub fn http(&self, more: &str) -> &'static str {
        let dir = self.dir.path().display();
        let files = format!("ca: {dir}/ca, cert: {dir}/cert, key: {dir}/key");
        leak(format!(", auth-token: {TOKEN}, tls: {{{files}}}{more}"))
    }
}

/// Settings are made of static text: a few lines for each test.
pub fn leak(text: String) -> &'static str {
    Box::leak(text.into_boxed_str())
}
