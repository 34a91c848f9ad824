//! Who may take a free lease: how far a node is, and whether another one is further.
//!
//! Pure: what stands in Consul and how long the lease has been free come in, a verdict goes out.
//! Transactions are counted over all databases, within a term. A term is one primaryship: each primary
//! writes a higher one than all before it, and a node has a term once it has had everything that the
//! term's primary had. So a node that kept transactions of an older term, which the primaries since
//! do not have, is behind, however many they are.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use ltx::{Checksum, Pgno, Pos};
use serde::{Deserialize, Serialize};

use crate::engine::DbName;
use crate::limits;

/// How far a node is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Standing {
    /// The last primaryship that it has reached.
    pub term: u64,
    /// The sum of the TXIDs of all databases.
    pub transactions: u64,
    /// A checksum over the names and positions of all databases.
    pub digest: String,
}

/// What a primary writes beside the lease about itself and its databases.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct Record {
    /// How far it is.
    #[serde(flatten)]
    pub standing: Standing,
    /// Its host name.
    pub hostname: String,
    /// The id of its process.
    pub node_id: String,
    /// It has stopped writing: nothing comes after this.
    pub complete: bool,
    /// How many databases it has.
    pub count: usize,
    /// The position of each, the first [`limits::RECORD_DATABASES_MAX`] by name; for people.
    pub databases: BTreeMap<String, String>,
}

/// What a candidate writes while it waits for the lease.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Rival {
    /// How far it is.
    #[serde(flatten)]
    pub standing: Standing,
    /// Its host name.
    pub hostname: String,
}

/// Whether a person wants a node to take the lease whatever it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Force {
    /// `litefs promote -force`.
    Yes,
    /// The rules hold.
    No,
}

/// Everything that a verdict depends on.
#[derive(Debug)]
pub struct Field<'a> {
    /// How far this node is.
    pub own: &'a Standing,
    /// Its databases.
    pub positions: &'a [(DbName, Pos)],
    /// What the last primary wrote.
    pub record: Option<&'a Record>,
    /// The other candidates.
    pub rivals: &'a [Rival],
    /// How long this node has known that the lease is free.
    pub waited: Duration,
    /// What a person wants.
    pub force: Force,
}

/// Whether to take the lease.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Take it.
    Run,
    /// Take it, although the last primary had more; in words.
    RunBehind(String),
    /// Let others have it, for now; why, in words.
    Wait(String),
    /// Do not take it at all; why, in words.
    Never(String),
}

impl Standing {
    /// The standing of a node in `term` whose databases are at `positions`.
    pub fn of(term: u64, positions: &[(DbName, Pos)]) -> Standing {
        let mut digest = Checksum::EMPTY;
        let mut transactions = 0_u64;
        for (name, pos) in positions.iter().filter(|(_, pos)| !pos.is_zero()) {
            transactions = transactions.saturating_add(pos.txid.0);
            // The number of a page is only a part of what is summed up.
            digest = digest.toggle(ltx::page_checksum(Pgno(1), format!("{name} {pos}").as_bytes()));
        }
        Standing { term, transactions, digest: digest.to_string() }
    }

    /// Whether `other` has something that this has not.
    pub fn is_behind(&self, other: &Standing) -> bool {
        let (ours, theirs) = ((self.term, self.transactions), (other.term, other.transactions));
        self.digest != other.digest && ours < theirs
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.transactions == 0
    }
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} transactions in term {}", self.transactions, self.term)
    }
}

impl Record {
    /// What a primary with these databases writes.
    pub fn of(term: u64, positions: &[(DbName, Pos)]) -> Record {
        let known = positions.iter().filter(|(_, pos)| !pos.is_zero());
        let text = |(name, pos): &(DbName, Pos)| (name.to_string(), pos.to_string());
        Record {
            standing: Standing::of(term, positions),
            count: known.clone().count(),
            databases: known.take(limits::RECORD_DATABASES_MAX).map(text).collect(),
            ..Record::default()
        }
    }

    /// What a node lacks of what the primary had; in words. Within a term a database of which less is
    /// there is behind, however far others are: the record is a second old, and they may have gone on.
    pub fn is_ahead_of(&self, own: &Standing, positions: &[(DbName, Pos)]) -> Option<String> {
        if own.is_behind(&self.standing) {
            return Some(format!("had {}, this node has {own}", self.standing));
        }
        let here = |name: &str| {
            let found = positions.iter().find(|(own, _)| own.as_str() == name);
            found.map_or(Pos::ZERO, |(_, pos)| *pos)
        };
        let listed = self.databases.iter().filter(|_| own.term <= self.standing.term);
        let mut behind = listed.filter_map(|(name, pos)| {
            let (there, here) = (pos.parse::<Pos>().ok()?, here(name));
            let lacks = here.txid < there.txid;
            lacks.then(|| format!("had {name} at {}, this node at {}", there.txid, here.txid))
        });
        behind.next()
    }

    /// Whether a node with these databases has everything that the record names.
    pub fn is_met_by(&self, positions: &[(DbName, Pos)]) -> bool {
        let has = |(name, pos): (&String, &String)| {
            positions.iter().any(|(own, at)| own.as_str() == name && at.to_string() == *pos)
        };
        // What is not listed is part of the sum and of the digest.
        let own = Standing::of(self.standing.term, positions);
        self.databases.iter().all(has) && !own.is_behind(&self.standing)
    }
}

impl Field<'_> {
    /// Whether this node takes the lease.
    pub fn verdict(&self) -> Verdict {
        if self.force == Force::Yes {
            return Verdict::Run;
        }
        let behind_record = self
            .record
            .and_then(|record| Some((record, record.is_ahead_of(self.own, self.positions)?)));
        if let Some((record, _)) = &behind_record
            && self.own.is_empty()
        {
            return Verdict::Never(format!(
                "this node has no data, and the last primary {:?} had {}: start a node that has \
                 them, or run `litefs promote -force` here to begin with what its backup has, or \
                 with nothing",
                record.hostname, record.standing
            ));
        }
        let ahead = self.rivals.iter().filter(|rival| self.own.is_behind(&rival.standing));
        if let Some(rival) = ahead.max_by_key(|r| (r.standing.term, r.standing.transactions)) {
            let text = format!(
                "candidate {:?} has {}, this node {}",
                rival.hostname, rival.standing, self.own
            );
            return match self.own.is_empty() || self.waited < limits::ELECTION_RIVAL_WAIT {
                true => Verdict::Wait(text),
                false => Verdict::RunBehind(text),
            };
        }
        let Some((record, lacks)) = behind_record else { return Verdict::Run };
        let text = format!("the last primary {:?} {lacks}", record.hostname);
        match self.waited < limits::ELECTION_RECORD_WAIT {
            true => Verdict::Wait(text),
            false => Verdict::RunBehind(text),
        }
    }

    /// The term of a primaryship that begins now.
    pub fn next_term(&self) -> u64 {
        let recorded = self.record.map_or(0, |record| record.standing.term);
        let rivals = self.rivals.iter().map(|rival| rival.standing.term);
        rivals.chain([recorded, self.own.term]).max().unwrap_or_default().saturating_add(1)
    }
}

#[cfg(test)]
mod tests {
    use ltx::Txid;

    use super::*;

    const NO_TIME: Duration = Duration::ZERO;

    /// One database at a transaction; `branch` tells histories apart.
    fn standing(term: u64, txid: u64, branch: u64) -> Standing {
        let pos = Pos { txid: Txid(txid), checksum: Checksum::flagged(branch * 1000 + txid) };
        Standing::of(term, &[(DbName::new("db").unwrap(), if txid > 0 { pos } else { Pos::ZERO })])
    }

    fn record(standing: Standing) -> Record {
        Record { standing, hostname: "old".to_owned(), ..Record::default() }
    }

    fn rival(standing: Standing) -> Rival {
        Rival { standing, hostname: "other".to_owned() }
    }

    #[track_caller]
    fn verdict(
        own: &Standing,
        last: Option<Standing>,
        rivals: &[Rival],
        waited: Duration,
    ) -> Verdict {
        let record = last.map(record);
        let record = record.as_ref();
        Field { own, positions: &[], record, rivals, waited, force: Force::No }.verdict()
    }

    #[test]
    fn who_has_what_the_primary_had_runs_at_once() {
        let own = standing(3, 10, 0);
        assert_eq!(verdict(&own, None, &[], NO_TIME), Verdict::Run);
        assert_eq!(verdict(&own, Some(standing(3, 10, 0)), &[], NO_TIME), Verdict::Run);
        assert_eq!(verdict(&own, Some(standing(3, 9, 0)), &[], NO_TIME), Verdict::Run);
        // The next primary died before it wrote anything.
        assert_eq!(verdict(&own, Some(standing(4, 10, 0)), &[], NO_TIME), Verdict::Run);
    }

    #[test]
    fn who_is_behind_gives_others_time_and_runs_then() {
        let own = standing(3, 10, 0);
        let last = || Some(standing(3, 12, 0));
        assert!(matches!(verdict(&own, last(), &[], NO_TIME), Verdict::Wait(_)));
        let late = verdict(&own, last(), &[], limits::ELECTION_RECORD_WAIT);
        assert!(matches!(&late, Verdict::RunBehind(why) if why.contains("had 12")), "{late:?}");
    }

    #[test]
    fn a_candidate_that_is_further_goes_first() {
        let own = standing(3, 10, 0);
        let rivals = [rival(standing(3, 11, 0)), rival(standing(3, 13, 0))];
        let wait = verdict(&own, Some(standing(3, 12, 0)), &rivals, limits::ELECTION_RECORD_WAIT);
        assert!(matches!(&wait, Verdict::Wait(why) if why.contains("has 13")), "{wait:?}");
        let late = verdict(&own, None, &rivals, limits::ELECTION_RIVAL_WAIT);
        assert!(matches!(late, Verdict::RunBehind(_)));
        assert_eq!(verdict(&rivals[1].standing, None, &[rival(own)], NO_TIME), Verdict::Run);
    }

    #[test]
    fn a_term_that_nobody_can_reach_ends_the_counting() {
        let last = record(standing(u64::MAX, 1, 0));
        let own = standing(3, 10, 0);
        let (record, force, waited) = (Some(&last), Force::No, NO_TIME);
        let field = Field { own: &own, positions: &[], record, rivals: &[], waited, force };
        assert_eq!(field.next_term(), u64::MAX);
    }

    #[test]
    fn transactions_of_an_older_term_do_not_count() {
        let diverged = standing(3, 100, 1);
        let last = Some(standing(4, 12, 0));
        assert!(matches!(verdict(&diverged, last.clone(), &[], NO_TIME), Verdict::Wait(_)));
        let rivals = [rival(diverged)];
        assert_eq!(verdict(&standing(4, 12, 0), last, &rivals, NO_TIME), Verdict::Run);
    }

    /// One database went on after the record was written, and another one did not come along.
    #[test]
    fn who_lacks_a_database_is_behind_whatever_the_sum_is() {
        let at = |name: &str, txid: u64| {
            let pos = Pos { txid: Txid(txid), checksum: Checksum::flagged(txid) };
            (DbName::new(name).unwrap(), pos)
        };
        let last =
            Record { hostname: "old".to_owned(), ..Record::of(3, &[at("a", 10), at("b", 20)]) };
        let verdict = |term, positions: &[(DbName, Pos)]| {
            let own = Standing::of(term, positions);
            let (record, rivals) = (Some(&last), &[]);
            Field { own: &own, positions, record, rivals, waited: NO_TIME, force: Force::No }
                .verdict()
        };
        assert_eq!(verdict(3, &[at("a", 10), at("b", 20)]), Verdict::Run);
        assert_eq!(verdict(3, &[at("a", 15), at("b", 20)]), Verdict::Run);
        let behind = verdict(3, &[at("a", 40), at("b", 5)]);
        assert!(
            matches!(&behind, Verdict::Wait(why) if why.contains("had b at 0000000000000014")),
            "{behind:?}"
        );
        assert!(matches!(verdict(3, &[at("a", 40)]), Verdict::Wait(_)));
        // What a later primary did without is gone.
        assert_eq!(verdict(4, &[at("a", 40)]), Verdict::Run);
    }

    #[test]
    fn an_empty_node_never_takes_over_data_unless_forced() {
        let own = standing(0, 0, 0);
        let last = record(standing(3, 12, 0));
        let ever = Duration::from_secs(1_000_000);
        let field = |force| Field {
            own: &own,
            positions: &[],
            record: Some(&last),
            rivals: &[],
            waited: ever,
            force,
        };
        assert!(matches!(field(Force::No).verdict(), Verdict::Never(_)));
        assert_eq!(field(Force::Yes).verdict(), Verdict::Run);
        assert_eq!(verdict(&own, Some(standing(1, 0, 0)), &[], NO_TIME), Verdict::Run);
        let rivals = [rival(standing(1, 1, 0))];
        assert!(matches!(verdict(&own, None, &rivals, ever), Verdict::Wait(_)));
    }

    #[test]
    fn each_term_is_higher_than_all_that_are_known() {
        let own = standing(3, 10, 0);
        let (last, rivals) = (record(standing(5, 1, 0)), [rival(standing(7, 1, 0))]);
        let field = |record, rivals| Field {
            own: &own,
            positions: &[],
            record,
            rivals,
            waited: NO_TIME,
            force: Force::No,
        };
        assert_eq!(field(None, &[]).next_term(), 4);
        assert_eq!(field(Some(&last), &[]).next_term(), 6);
        assert_eq!(field(Some(&last), &rivals).next_term(), 8);
    }

    #[test]
    fn a_record_reads_back_and_is_bounded() {
        let name = |n: usize| DbName::new(&format!("db{n:05}")).unwrap();
        let pos = Pos { txid: Txid(1), checksum: Checksum::flagged(1) };
        let positions: Vec<_> = (0..2000).map(|n| (name(n), pos)).collect();
        let record = Record::of(2, &positions);
        assert_eq!((record.count, record.standing.transactions), (2000, 2000));
        let json = serde_json::to_string(&record).unwrap();
        assert!(json.len() < 64 << 10, "{} bytes", json.len());
        assert_eq!(serde_json::from_str::<Record>(&json).unwrap(), record);
        assert!(record.is_met_by(&positions));
        assert!(!record.is_met_by(&positions[1..]), "one that is listed is missing");
        assert!(!record.is_met_by(&positions[..1999]), "one that is not listed is missing");
        assert_eq!(serde_json::from_str::<Record>("{}").unwrap(), Record::default());
    }
}
