//! Plain SQLite in memory, in which the same changes are made; and what a database holds, as text.

use std::fmt::Write as _;
use std::path::Path;

use rusqlite::{Connection, types::ValueRef};

use super::script::Sql;

/// The schemas of the two databases.
const SCHEMAS: [&str; 2] = ["main", "b"];

/// Both databases.
pub struct Reference(Connection);

impl Reference {
    /// Empty ones.
    pub fn new() -> Reference {
        let connection = Connection::open_in_memory().unwrap();
        connection.execute_batch("attach ':memory:' as b").unwrap();
        Reference(connection)
    }

    /// Makes a change; whether SQLite takes it.
    pub fn apply(&self, sql: &Sql) -> bool {
        let text = named(sql, SCHEMAS);
        self.0.execute_batch(&text).is_ok()
    }

    /// Whether SQLite takes a change after others of its transaction; all are taken back.
    pub fn takes(&self, before: &[Change], change: &Change) -> bool {
        self.with(before, |reference| match change {
            Change::Sql(sql) => reference.apply(sql),
            Change::Savepoint(text) => reference.0.execute_batch(text).is_ok(),
        })
    }

    /// Whether SQLite takes a statement that changes no row, with `@0` and `@1` for the databases.
    pub fn takes_aside(&self, sql: &str) -> bool {
        let text = sql.replace("@0", SCHEMAS[0]).replace("@1", SCHEMAS[1]);
        self.0.execute_batch(&text).is_ok()
    }

    /// Runs a statement that must succeed.
    pub fn run(&self, sql: &str) {
        self.0.execute_batch(sql).unwrap_or_else(|error| panic!("{sql}: {error}"));
    }

    /// What a database holds after these changes, and whether SQLite takes the last one; they are
    /// taken back.
    pub fn with<T>(&self, changes: &[Change], then: impl FnOnce(&Reference) -> T) -> T {
        self.run("begin");
        self.play(changes);
        let found = then(self);
        self.run("rollback");
        found
    }

    /// Makes the changes of one transaction.
    pub fn commit(&self, changes: &[Change]) {
        self.run("begin");
        self.play(changes);
        self.run("commit");
    }

    /// Makes changes within a transaction.
    fn play(&self, changes: &[Change]) {
        for change in changes {
            match change {
                Change::Sql(sql) => _ = self.apply(sql),
                Change::Savepoint(text) => _ = self.0.execute_batch(text),
            }
        }
    }

    /// What one database holds.
    pub fn dump(&self, database: usize) -> String {
        dump(&self.0, SCHEMAS[database])
    }

    /// The sums of a table; none if there is no such table.
    pub fn sums(&self, database: usize, table: u64) -> Option<String> {
        let sql = sums(SCHEMAS[database], table);
        self.0.query_row(&sql, [], |row| row.get(0)).ok()
    }

    /// Removes all that a database holds.
    pub fn clear(&self, database: usize) {
        let schema = SCHEMAS[database];
        for table in 1..=3 {
            self.run(&format!("drop table if exists {schema}.t{table}"));
        }
        self.run(&format!("pragma {schema}.user_version=0"));
    }
}

/// One step of a transaction.
#[derive(Debug, Clone)]
pub enum Change {
    /// A change.
    Sql(Sql),
    /// Something about a savepoint.
    Savepoint(String),
}

/// A statement with the names of the schemas.
pub fn named(sql: &Sql, schemas: [&str; 2]) -> String {
    let other = format!("{}.", schemas[1 - sql.database]);
    let ours = format!("{}.", schemas[sql.database]);
    sql.text.replace("@@.", &other).replace("@.", &ours)
}

/// Asks for one row that changes with the rows of a table.
pub fn sums(schema: &str, table: u64) -> String {
    format!(
        "select count(*) || ' ' || coalesce(sum(k * length(v)), 0) || ' ' || coalesce(sum(length(w)), 0) \
         || ' ' || coalesce(max(v), '') || '.' from {schema}.t{table}"
    )
}

/// What the file of a database holds.
pub fn dump_file(path: &Path) -> String {
    let connection = Connection::open(path).unwrap();
    let found: String =
        connection.query_row("pragma integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(found, "ok", "{}", path.display());
    dump(&connection, "main")
}

fn dump(connection: &Connection, schema: &str) -> String {
    let mut text = String::new();
    let version = format!("pragma {schema}.user_version");
    let version: i64 = connection.query_row(&version, [], |row| row.get(0)).unwrap();
    let _ = writeln!(text, "user_version {version}");
    let names = format!("select type, name, sql from {schema}.sqlite_schema order by 1, 2");
    let mut names = connection.prepare(&names).unwrap();
    let mut tables = Vec::new();
    let mut rows = names.query([]).unwrap();
    while let Some(row) = rows.next().unwrap() {
        let (kind, name): (String, String) = (row.get(0).unwrap(), row.get(1).unwrap());
        let sql: Option<String> = row.get(2).unwrap();
        let _ = writeln!(text, "{kind} {name} {}", sql.unwrap_or_default());
        if kind == "table" {
            tables.push(name);
        }
    }
    for table in tables {
        let mut rows =
            connection.prepare(&format!("select * from {schema}.{table} order by 1")).unwrap();
        let columns = rows.column_count();
        let mut rows = rows.query([]).unwrap();
        while let Some(row) = rows.next().unwrap() {
            let _ = write!(text, "{table}");
            for column in 0..columns {
                let value = match row.get_ref(column).unwrap() {
                    ValueRef::Null => "null".to_owned(),
                    ValueRef::Integer(number) => number.to_string(),
                    ValueRef::Text(bytes) | ValueRef::Blob(bytes) => {
                        String::from_utf8_lossy(bytes).into_owned()
                    }
                    ValueRef::Real(number) => number.to_string(),
                };
                let _ = write!(text, "|{value}");
            }
            text.push('\n');
        }
    }
    text
}

/// The first line in which two dumps differ.
pub fn difference(found: &str, wanted: &str) -> String {
    let short = |line: Option<&str>| {
        line.map_or("nothing".to_owned(), |line| line.chars().take(120).collect())
    };
    let (mut found, mut wanted) = (found.lines(), wanted.lines());
    loop {
        match (found.next(), wanted.next()) {
            (None, None) => return "no difference".to_owned(),
            (one, other) if one != other => {
                return format!("found {:?}, not {:?}", short(one), short(other));
            }
            _ => {}
        }
    }
}
