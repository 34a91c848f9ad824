//! Who wants to know that a position moved: the streams, and the watchers of events.
//!
//! A subscription is a set of dirty names plus one wake-up, never a queue: a slow subscriber costs
//! nothing. It is woken when its set becomes non-empty, so a subscriber that lets a millisecond pass
//! before it takes the set is woken once in that time, however many commits there are.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};

use ltx::{PageSize, Pos};

use super::name::DbName;

type Wake = Box<dyn Fn() + Send + Sync>;
type Sink = Box<dyn Fn(&Event) + Send + Sync>;

/// What happened on this node.
#[derive(Debug, Clone)]
pub enum Event {
    /// A transaction was committed here or applied here.
    Tx {
        /// The database.
        db: DbName,
        /// Its position afterwards.
        pos: Pos,
        /// Its page size.
        page_size: PageSize,
        /// Its size in pages.
        commit: u32,
        /// When the transaction was made, in milliseconds since the Unix epoch.
        timestamp_ms: i64,
    },
    /// The role of this node, or the primary it follows, changed.
    PrimaryChange {
        /// Whether this node is the primary.
        is_primary: bool,
        /// The primary's host name, if it is another node.
        hostname: Option<String>,
    },
    /// This node is the primary, has granted no write lock for a while, and grants them again.
    WritesResumed,
}

/// The subscribers of one node.
#[derive(Default)]
pub struct Feed {
    /// How many subscriptions and watches there are: a commit nobody waits for takes no lock.
    subscribers: AtomicUsize,
    watchers: AtomicUsize,
    /// The live subscriptions and watches.
    lists: Mutex<Lists>,
}

#[derive(Default)]
struct Lists {
    subscriptions: Vec<Weak<Shared>>,
    watches: Vec<Weak<Sink>>,
}

struct Shared {
    wake: Wake,
    /// The databases whose position moved since the last `take`.
    dirty: Mutex<BTreeSet<DbName>>,
}

/// The dirty set of one subscriber; dropped, it unsubscribes.
pub struct Subscription {
    feed: Arc<Feed>,
    shared: Arc<Shared>,
}

/// A watch on the events; dropped, it ends.
pub struct EventWatch {
    feed: Arc<Feed>,
    _sink: Arc<Sink>,
}

impl Feed {
    /// A new subscription; `wake` is called, from any thread, when its dirty set becomes non-empty.
    pub fn subscribe(self: &Arc<Feed>, wake: Wake) -> Subscription {
        let shared = Arc::new(Shared { wake, dirty: Mutex::default() });
        let mut lists = self.lists.lock().unwrap();
        lists.subscriptions.retain(|one| one.strong_count() > 0);
        lists.subscriptions.push(Arc::downgrade(&shared));
        self.subscribers.fetch_add(1, Ordering::SeqCst);
        Subscription { feed: self.clone(), shared }
    }

    /// Calls `sink` for each event from now on; it must be quick.
    pub fn watch(self: &Arc<Feed>, sink: Sink) -> EventWatch {
        let sink = Arc::new(sink);
        let mut lists = self.lists.lock().unwrap();
        lists.watches.retain(|one| one.strong_count() > 0);
        lists.watches.push(Arc::downgrade(&sink));
        self.watchers.fetch_add(1, Ordering::SeqCst);
        EventWatch { feed: self.clone(), _sink: sink }
    }

    /// How many subscriptions there are.
    pub fn subscriber_count(&self) -> usize {
        self.subscribers.load(Ordering::SeqCst)
    }

    /// Whether anybody watches events.
    pub fn has_watchers(&self) -> bool {
        self.watchers.load(Ordering::SeqCst) > 0
    }

    /// The position of `name` moved.
    pub fn mark(&self, name: &DbName) {
        if self.subscribers.load(Ordering::SeqCst) == 0 {
            return;
        }
        let live: Vec<Arc<Shared>> = {
            let lists = self.lists.lock().unwrap();
            lists.subscriptions.iter().filter_map(Weak::upgrade).collect()
        };
        for subscription in live {
            subscription.mark(name);
        }
    }

    /// Tells the watchers of an event.
    pub fn emit(&self, event: &Event) {
        let live: Vec<Arc<Sink>> = {
            let lists = self.lists.lock().unwrap();
            lists.watches.iter().filter_map(Weak::upgrade).collect()
        };
        for sink in live {
            sink(event);
        }
    }
}

impl Shared {
    fn mark(&self, name: &DbName) {
        let was_empty = {
            let mut dirty = self.dirty.lock().unwrap();
            let was_empty = dirty.is_empty();
            if !dirty.contains(name) {
                dirty.insert(name.clone());
            }
            was_empty
        };
        if was_empty {
            (self.wake)();
        }
    }
}

impl Subscription {
    /// Takes the set of databases whose position moved since the last call.
    pub fn take(&self) -> BTreeSet<DbName> {
        std::mem::take(&mut *self.shared.dirty.lock().unwrap())
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.feed.subscribers.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Drop for EventWatch {
    fn drop(&mut self) {
        self.feed.watchers.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subscriber_is_woken_once_until_it_takes() {
        let feed = Arc::new(Feed::default());
        let woken = Arc::new(AtomicUsize::new(0));
        let count = woken.clone();
        let subscription = feed.subscribe(Box::new(move || {
            count.fetch_add(1, Ordering::SeqCst);
        }));
        let (a, b) = (DbName::new("a").unwrap(), DbName::new("b").unwrap());
        feed.mark(&a);
        feed.mark(&b);
        feed.mark(&a);
        assert_eq!(woken.load(Ordering::SeqCst), 1);
        assert_eq!(subscription.take(), BTreeSet::from([a.clone(), b]));
        assert!(subscription.take().is_empty());
        feed.mark(&a);
        assert_eq!(woken.load(Ordering::SeqCst), 2);
        drop(subscription);
        assert_eq!(feed.subscriber_count(), 0);
    }
}
