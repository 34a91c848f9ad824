//! A node in this process: an engine with a real mount, whose role a test decides. The files of the
//! mount are for other processes only.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use litefs::engine::{
    self, Db, DbName, Engine, LtxBytes, Next, Overlap, PrimaryInfo, Role, layout::DbDir,
};
use litefs::volume::EngineVolume;
use ltx::{Compression, NodeId, Pos};

use super::image;

/// The node. Dropped, it is unmounted and closed.
pub struct Local {
    pub engine: Arc<Engine>,
    mount: fuse::Mount,
    dir: tempfile::TempDir,
}

/// Following a node that does not matter.
pub fn replica() -> Role {
    Role::Replica(PrimaryInfo { hostname: String::new(), advertise_url: String::new() })
}

impl Local {
    /// A primary with a data directory of its own, or a copy of `data`.
    pub fn primary(passthrough: &str, id: u64, data: Option<&Path>) -> Local {
        let dir = tempfile::tempdir().unwrap();
        let (own, mount) = (dir.path().join("data"), dir.path().join("mnt"));
        std::fs::create_dir_all(&mount).unwrap();
        match data {
            Some(data) => copy(data, &own),
            None => std::fs::create_dir_all(&own).unwrap(),
        }
        let engine = Engine::open(engine::Options {
            dir: own,
            compression: Compression::Lz4,
            retention: Duration::ZERO,
            retention_interval: Duration::ZERO,
            retain: engine::Retain::Free,
            strict_verify: true,
            node_id: NodeId(id),
            clock: Box::new(|| 1),
        });
        let engine = engine.unwrap();
        let probe = File::create(dir.path().join("probe")).unwrap();
        let mut options = fuse::MountOptions::new(&mount, probe);
        options.transport = fuse::Transport::Dev;
        if passthrough == "off" {
            options.passthrough = fuse::PassthroughMode::Off;
        }
        let mount = fuse::mount(Arc::new(EngineVolume::new(engine.clone())), options).unwrap();
        assert_eq!(engine.shared().is_passthrough(), passthrough != "off");
        engine.set_role(Role::Primary);
        Local { engine, mount, dir }
    }

    /// A file of the mount.
    pub fn file(&self, name: &str) -> PathBuf {
        self.mount.dir().join(name)
    }

    /// The data directory.
    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// The directory of a database.
    pub fn db_dir(&self, name: &str) -> DbDir {
        image::directory(&self.data(), name)
    }

    /// A database.
    pub fn db(&self, name: &str) -> Arc<Db> {
        self.engine.database(name).unwrap()
    }

    /// The bytes of the LTX file that follows on `pos`.
    pub fn ltx_after(&self, name: &str, pos: Pos) -> Vec<u8> {
        match self.db(name).next_after(pos, Overlap::Refused) {
            Next::Ltx { bytes: LtxBytes::Memory(bytes), .. } => bytes.to_vec(),
            Next::Ltx { bytes: LtxBytes::File(mut file, _), .. } => {
                let mut bytes = Vec::new();
                file.read_to_end(&mut bytes).unwrap();
                bytes
            }
            _ => panic!("no ltx file after {pos}"),
        }
    }

    /// Hands an LTX file over as it comes off the wire.
    pub fn receive(&self, name: &str, bytes: &[u8]) -> engine::Result<Pos> {
        let mut receiver = self.engine.receive(&DbName::new(name).unwrap()).unwrap();
        receiver.write_all(bytes).unwrap();
        receiver.finish()
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        if let Err(error) = self.mount.unmount() {
            eprintln!("unmount {}: {error}", self.mount.dir().display());
        }
        if let Err(error) = self.engine.close() {
            eprintln!("close {}: {error}", self.data().display());
        }
    }
}

/// Copies a directory with all that is in it.
pub fn copy(from: &Path, to: &Path) {
    let mut command = std::process::Command::new("cp");
    assert!(command.arg("-a").args([from, to]).status().unwrap().success());
}
