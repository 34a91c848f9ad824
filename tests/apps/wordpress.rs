//! WordPress with its SQLite plugin, served by PHP, which each node runs and supervises. The
//! database has the plugin's own name for it and its own settings: a rollback journal.

use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Pair, run};
use crate::support::consul::Consul;
use crate::support::node::{Lease, Member, Node, Settings, free_address, is_mounted};
use crate::support::{program, wait};

/// The database of a site.
pub const DB: &str = ".ht.sqlite";

/// A site is made through its own pages on the primary; a visitor of the replica reads and, through
/// its proxy, logs in and writes.
#[test]
fn wordpress_is_read_and_written_on_both_nodes() {
    let (ours, theirs) = (Site::new(), Site::new());
    let primary = node(&ours, Member::Primary);
    let replica = node(&theirs, Member::Replica(&primary.url()));
    let pair = Pair::start(primary, replica);

    let author = ours.visit();
    author.install("A replicated site");
    author.log_in();
    author.publish("First of all", "This was written on the primary.");
    let settings = [("description", "Two nodes, one database")];
    assert_eq!(author.rest("/wp/v2/settings", &settings).status, 200);
    pair.sync(DB);

    let editor = theirs.visit();
    editor.get("/").shows("A replicated site");
    editor.get("/?s=primary").shows("This was written on the primary.");
    editor.log_in();
    editor.publish("Second", "This was written on the replica.");
    // Who has written sees it at once, on the replica.
    editor.get("/").shows("Second");
    author.get("/").shows("Second");
    // Who passes the proxy by is told that it did not work.
    let form = [("comment_post_ID", "1"), ("author", "a"), ("email", "a@b.cd"), ("comment", "no")];
    let refused = theirs.visit_past_proxy().post("/wp-comments-post.php", &form);
    assert!(refused.text.contains("could not be saved"), "{}", refused.text);
    pair.check(DB);
}

/// The primary dies with all that it runs. Who was logged in goes on on the other node, and what was
/// written there is on the first one when it is back.
#[test]
fn wordpress_goes_on_on_another_node_when_its_primary_dies() {
    let consul = Consul::start();
    let (ours, theirs) = (Site::new(), Site::new());
    let lease = |hostname| {
        let url = consul.url().leak();
        Member::Consul(Lease { url, hostname, advertise: "", candidate: true, ttl: "10s" })
    };
    let (mut one, mut two) = (node(&ours, lease("one")), node(&theirs, lease("two")));
    one.start();
    two.start();

    let mut author = ours.visit();
    author.install("A site that survives");
    author.log_in();
    author.publish("Before", "This was written on the first primary.");
    two.wait_for_pos(DB, one.pos(DB));
    one.kill();
    ours.kill_php();

    two.wait_for_log("primary lease acquired");
    author.go_to(&theirs);
    author.publish("After", "This was written on the second primary.");
    author.get("/").shows("Before");
    one.start();
    one.wait_for_pos(DB, two.pos(DB));
    let visitor = ours.visit();
    visitor.get("/").shows("After");
    Pair { primary: two, replica: one }.check(DB);
}

/// The script for people to look at a site: it answers on both nodes, and Ctrl-C leaves nothing behind.
#[test]
fn a_site_to_look_at_is_made_and_ended() {
    let dir = tempfile::tempdir().unwrap();
    let addresses = [(); 6].map(|()| free_address());
    let ports = addresses.iter().map(|address| address.rsplit_once(':').unwrap().1);
    let mut script =
        Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/wordpress/try"));
    script.env("RUN_DIR", dir.path()).env("LITEFS", program::litefs());
    script.env("PORTS", ports.collect::<Vec<_>>().join(" "));
    let mut child = script.stdout(std::process::Stdio::null()).spawn().unwrap();
    let _limit = program::Limit::new(&child);
    wait::until_true("the site's first page", || {
        Browser::at(&addresses[0]).get("/").text.contains("five-minute WordPress installation")
    });
    Browser::at(&addresses[0]).install("A site to look at");
    wait::until_true("the site on the replica", || {
        Browser::at(&addresses[1]).get("/").text.contains("A site to look at")
    });
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT).unwrap();
    assert!(child.wait().unwrap().success());
    for name in ["one", "two"] {
        assert!(!is_mounted(&dir.path().join(name).join("mnt")), "{name} is still mounted");
    }
}

/// A node that serves `site`.
pub fn node(site: &Site, member: Member<'_>) -> Node {
    let node = Node::new(&Settings::default(), member);
    let lines = site.lines(&node).leak();
    node.configure(&Settings { lines, ..Settings::default() }, member);
    node
}

/// The name of the site for its visitors.
const HOST: &str = "site.test";

/// Who may do everything.
const USER: &str = "admin";
const PASSWORD: &str = "correct horse battery staple";

/// One node's web server, with the proxy of litefs in front of it.
pub struct Site {
    /// Where PHP answers, `HOST:PORT`.
    php: String,
    /// Where the proxy answers.
    proxy: String,
    /// Has the process id of PHP, which outlives a node that is killed.
    dir: tempfile::TempDir,
}

impl Drop for Site {
    fn drop(&mut self) {
        // After a node that ended by itself there is nobody to kill.
        if let Some(pid) = self.php_pid() {
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
}

/// A browser with its cookies, at one address.
pub struct Browser {
    address: String,
    jar: PathBuf,
    _dir: tempfile::TempDir,
}

/// A page as a browser gets it.
pub struct Page {
    /// The HTTP status; 0 if there was no answer.
    pub status: u16,
    /// The body.
    pub text: String,
}

impl Page {
    /// The page must be there, and show `text`.
    #[track_caller]
    pub fn shows(&self, text: &str) {
        assert!(
            self.status == 200 && self.text.contains(text),
            "{} without {text:?}:\n{}",
            self.status,
            self.text
        );
    }
}

impl Site {
    /// A site at free addresses, once a node with [`Site::lines`] runs.
    pub fn new() -> Site {
        let dir = tempfile::tempdir().unwrap();
        Site { php: free_address(), proxy: free_address(), dir }
    }

    /// The lines of a configuration that make `node` serve the site.
    pub fn lines(&self, node: &Node) -> String {
        let Site { php, proxy, .. } = self;
        let (dir, log, files) = (node.mount(), node.scratch("php.log"), files());
        let pid = self.pid_file().display().to_string();
        let (dir, log, files) = (dir.display(), log.display(), files.display());
        format!(
            "exec: \"sh -c 'echo $$$$ >{pid}; exec env DB_DIR={dir} WORDPRESS_SECRET=secret WP_DEBUG_LOG={log} php -S {php} -t {files}'\"\n\
             proxy: {{addr: '{proxy}', target: '{php}', db: {DB}, \
             always-forward: [/wp-login.php, '/wp-admin/*']}}"
        )
    }

    /// A browser without cookies that goes through the proxy.
    pub fn visit(&self) -> Browser {
        Browser::at(&self.proxy)
    }

    /// Kills the web server, as the end of a container does that of its first process.
    pub fn kill_php(&self) {
        kill(self.php_pid().expect("the web server was started"), Signal::SIGKILL).unwrap();
        wait::until_true("the web server to be gone", || {
            std::net::TcpStream::connect(&self.php).is_err()
        });
    }

    fn pid_file(&self) -> PathBuf {
        self.dir.path().join("php.pid")
    }

    fn php_pid(&self) -> Option<Pid> {
        let pid = std::fs::read_to_string(self.pid_file()).ok()?;
        Some(Pid::from_raw(pid.trim().parse().ok()?))
    }

    /// A browser that passes the proxy by.
    pub fn visit_past_proxy(&self) -> Browser {
        Browser::at(&self.php)
    }
}

impl Browser {
    fn at(address: &str) -> Browser {
        let dir = tempfile::tempdir().unwrap();
        Browser { address: address.to_owned(), jar: dir.path().join("cookies"), _dir: dir }
    }

    /// From now on the pages are those of another node.
    pub fn go_to(&mut self, site: &Site) {
        self.address.clone_from(&site.proxy);
    }

    /// A page. Waits until somebody answers.
    #[track_caller]
    pub fn get(&self, path: &str) -> Page {
        self.request(path, &[])
    }

    /// A form, filled in and sent.
    #[track_caller]
    pub fn post(&self, path: &str, form: &[(&str, &str)]) -> Page {
        let fields: Vec<String> =
            form.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let arguments = fields.iter().flat_map(|field| ["--data-urlencode", field]);
        self.request(path, &arguments.collect::<Vec<_>>())
    }

    /// Fills in the forms of the installer, as the person who begins a site does.
    #[track_caller]
    pub fn install(&self, title: &str) {
        self.get("/wp-admin/install.php").shows("famous five-minute WordPress installation");
        let form = [
            ("weblog_title", title),
            ("user_name", USER),
            ("admin_password", PASSWORD),
            ("admin_password2", PASSWORD),
            ("pw_weak", "1"),
            ("admin_email", "admin@example.org"),
            ("language", ""),
        ];
        self.post("/wp-admin/install.php?step=2", &form).shows("<h1>Success!</h1>");
    }

    /// Logs in; from then on the pages are those of [`USER`].
    #[track_caller]
    pub fn log_in(&self) {
        self.get("/wp-login.php").shows("Username or Email Address");
        let form = [("log", USER), ("pwd", PASSWORD), ("testcookie", "1"), ("wp-submit", "Log In")];
        self.post("/wp-login.php", &form).shows("Dashboard");
    }

    /// Calls the REST interface with `fields`, as the editor does.
    #[track_caller]
    pub fn rest(&self, route: &str, fields: &[(&str, &str)]) -> Page {
        let nonce = self.get("/wp-admin/admin-ajax.php?action=rest-nonce").text;
        self.post(&format!("/?rest_route={route}&_wpnonce={nonce}"), fields)
    }

    /// Publishes a post.
    #[track_caller]
    pub fn publish(&self, title: &str, text: &str) {
        let fields = [("title", title), ("content", text), ("status", "publish")];
        let page = self.rest("/wp/v2/posts", &fields);
        assert_eq!(page.status, 201, "{}", page.text);
    }

    #[track_caller]
    fn request(&self, path: &str, arguments: &[&str]) -> Page {
        let answer = wait::until("an answer of the site", || {
            let page = self.attempt(path, arguments);
            (page.status != 0).then_some(page)
        });
        assert!(!answer.text.contains("Fatal error"), "{}", answer.text);
        answer
    }

    /// A page, or a status of 0 if nobody listens.
    fn attempt(&self, path: &str, arguments: &[&str]) -> Page {
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--location", "--max-time", "60", "--write-out", "\n%{http_code}"]);
        // One name for all nodes, as behind a load balancer: WordPress's cookies are for that name.
        curl.args(["--connect-to", &format!("{HOST}:80:{}", self.address)]);
        curl.arg("--cookie").arg(&self.jar).arg("--cookie-jar").arg(&self.jar);
        let output = program::output(curl.args(arguments).arg(format!("http://{HOST}{path}")));
        let output = output.expect("curl can be run").stdout;
        let text = String::from_utf8_lossy(&output);
        let (text, status) = text.rsplit_once('\n').unwrap_or_default();
        Page { status: status.parse().unwrap_or(0), text: text.to_owned() }
    }
}

/// The files of the site, the same for every node; fetched the first time.
fn files() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    run(&mut Command::new(root.join(".ci/wordpress")));
    root.join("target/wordpress")
}
