//! Owns one table of a list in the file, such as one `[[livekit.rules]]`: its keys, its faults, and which of its keys are unknown.

use toml::{Table, Value};

use super::reader::edit_distance;
use super::value::Raw;

/// A table that is being read. No variable reaches into a list.
pub(super) struct Entry {
    /// Such as `livekit.rules[2]`, counted from 1.
    path: String,
    /// What no key has claimed yet.
    unclaimed: Table,
    taken: Vec<Taken>,
    faults: Vec<(String, String)>,
}

struct Taken {
    name: &'static str,
    is_set: bool,
}

impl Entry {
    pub(super) fn new(path: String, table: Table) -> Self {
        Self { path, unclaimed: table, taken: Vec::new(), faults: Vec::new() }
    }

    /// Takes a key. After a fault it is absent too; the fault is kept for [`Entry::finish`].
    pub(super) fn take<T>(&mut self, name: &'static str, parse: impl Fn(&Raw) -> Result<T, String>) -> Option<T> {
        let raw = self.unclaimed.remove(name).map(Raw::File);
        self.taken.push(Taken { name, is_set: raw.is_some() });
        parse(&raw?).map_err(|problem| self.fault(name, problem)).ok()
    }

    /// Whether the file has the key, valid or not.
    pub(super) fn is_set(&self, name: &str) -> bool {
        self.taken.iter().any(|taken| taken.name == name && taken.is_set)
    }

    /// Notes a fault in a key.
    pub(super) fn fault(&mut self, name: &str, problem: impl Into<String>) {
        self.faults.push((self.key(name), problem.into()));
    }

    /// The names of all keys that were taken.
    #[cfg(test)]
    pub(super) fn names(&self) -> impl Iterator<Item = &'static str> {
        self.taken.iter().map(|taken| taken.name)
    }

    /// All faults, with their keys, and one for each key that nobody took.
    pub(super) fn finish(mut self) -> Vec<(String, String)> {
        for name in self.unclaimed.keys() {
            let distances = self.taken.iter().map(|taken| (edit_distance(taken.name, name), taken.name));
            let problem = match distances.min().filter(|(distance, _)| *distance <= 2) {
                Some((_, meant)) => format!("unknown key, did you mean {}?", self.key(meant)),
                None => "unknown key".to_owned(),
            };
            self.faults.push((self.key(name), problem));
        }
        self.faults
    }

    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.path)
    }
}

/// A list of tables, which no variable can hold.
pub(super) fn tables(raw: &Raw) -> Result<Vec<Table>, String> {
    const EXPECTED: &str = "a list of tables in the file";
    let Raw::File(Value::Array(list)) = raw else { return Err(raw.of_wrong_type(EXPECTED)) };
    let table = |item: &Value| item.as_table().cloned().ok_or_else(|| format!("has an item of type {}, expected {EXPECTED}", item.type_str()));
    list.iter().map(table).collect()
}
