//! Nodes with a proxy, each in front of a small application that keeps its data on the node's mount.

use crate::support::node::{Member, Node, Settings, free_address};
use crate::support::wait;

use self::app::App;
use self::wire::Message;

/// The application.
mod app;
/// HTTP by hand.
mod wire;

/// Large and strange messages through one or two proxies.
mod bodies;
/// Where a request goes, and what becomes of its headers.
mod decisions;
/// A primary that is not there when a write comes.
mod hold;
/// What dashboards ask for.
mod metrics;
/// Health, and reading one's own writes.
mod reads;

/// A primary and its replicas, each with a proxy and an application.
struct Site {
    /// Node 0 is the primary.
    nodes: Vec<Node>,
    apps: Vec<App>,
    /// Where the proxies listen.
    proxies: Vec<String>,
}

/// What differs from one test to the other.
#[derive(Default)]
struct Plan {
    /// More keys of the section `proxy`, each with a leading comma.
    proxy: &'static str,
    /// More keys of the section `http`, each with a leading comma.
    http: &'static str,
    /// More keys of the section `lease`, each with a leading comma.
    lease: &'static str,
    environment: &'static [(&'static str, &'static str)],
    /// More lines.
    lines: &'static str,
}

impl Site {
    /// So many nodes, all ready.
    #[track_caller]
    fn of(count: usize) -> Site {
        Site::with(count, &Plan::default())
    }

    #[track_caller]
    fn with(count: usize, plan: &Plan) -> Site {
        let mut site = Site { nodes: Vec::new(), apps: Vec::new(), proxies: Vec::new() };
        for _ in 0..count {
            let url = site.nodes.first().map(Node::url);
            let member = url.as_deref().map_or(Member::Primary, Member::Replica);
            site.add(plan, member);
        }
        for node in &mut site.nodes {
            node.spawn();
        }
        for node in &site.nodes {
            node.wait_ready();
        }
        site
    }

    /// Adds a node that is not started.
    fn add(&mut self, plan: &Plan, member: Member<'_>) {
        let (proxy, app) = (free_address(), free_address());
        let lines = format!(
            "proxy: {{addr: '{proxy}', target: '{app}', db: app.db{}}}\n{}",
            plan.proxy, plan.lines
        );
        let settings = Settings {
            // A few lines for each node of a test.
            lines: Box::leak(lines.into_boxed_str()),
            environment: plan.environment,
            http: plan.http,
            lease: plan.lease,
            ..Settings::default()
        };
        let node = Node::new(&settings, member);
        self.apps.push(App::start(&app, &node.file("app.db")));
        self.nodes.push(node);
        self.proxies.push(proxy);
    }

    /// One request to the proxy of a node.
    #[track_caller]
    fn ask(&self, node: usize, method: &str, path: &str, head: &str) -> Message {
        wire::ask(&self.proxies[node], method, path, head, b"")
    }

    /// The id by which a node is known to others.
    fn node_id(&self, node: usize) -> String {
        self.status(node, "nodeId")
    }

    /// A text in the status of a node.
    fn status(&self, node: usize, field: &str) -> String {
        let status = http_get(&self.nodes[node].url(), "/status");
        let (_, rest) = status.split_once(&format!("\"{field}\": \"")).unwrap();
        rest.split('"').next().unwrap().to_owned()
    }

    /// A metric of a node, by the beginning of its line.
    fn metric(&self, node: usize, line: &str) -> f64 {
        let text = http_get(&self.nodes[node].url(), "/metrics");
        let line = text.lines().find_map(|found| found.strip_prefix(line));
        line.map_or(0.0, |value| value.trim().parse().unwrap())
    }
}

/// A text of the API of a node.
#[track_caller]
fn http_get(url: &str, path: &str) -> String {
    let address = url.strip_prefix("http://").unwrap();
    wait::until("an answer of the API", || {
        let answer = wire::ask(address, "GET", path, "", b"");
        (answer.status() == 200).then(|| answer.text())
    })
}
