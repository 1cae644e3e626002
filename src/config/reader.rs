//! Owns the walk from file and environment to values: which source wins, which keys exist, and every fault on the way.
//!
//! Each key is taken once. Whatever nobody took is unknown, so the list of keys is nowhere written twice.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use toml::{Table, Value};

use super::entry::{Entry, tables};
use super::env::Env;
use super::error::{ConfigError, Fault};
use super::secret::Secret;
use super::value::Raw;

const PREFIX: &str = "LIVE_MEETING__";

/// Collects values and faults; [`Reader::finish`] tells whether there were any.
pub(super) struct Reader<'a> {
    env: &'a Env,
    file: String,
    /// What no key has claimed yet.
    unclaimed: Table,
    taken: BTreeMap<Key, Taken>,
    faults: Vec<Fault>,
}

/// The address of one value.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) section: &'static str,
    pub(super) name: &'static str,
}

/// What is known of a key once it was taken.
pub(super) struct Taken {
    /// The variable or file that set it.
    origin: Option<String>,
    #[cfg(test)]
    pub(super) is_secret: bool,
}

impl Key {
    pub(super) fn variable(self) -> String {
        format!("{PREFIX}{}__{}", self.section, self.name).to_ascii_uppercase()
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.section, self.name)
    }
}

impl<'a> Reader<'a> {
    /// `path` is how faults name the file.
    pub(super) fn new(file: Table, path: &Path, env: &'a Env) -> Self {
        let file_name = path.display().to_string();
        Self { env, file: file_name, unclaimed: file, taken: BTreeMap::new(), faults: Vec::new() }
    }

    /// Takes a key that has a default, written as a variable would be.
    ///
    /// # Panics
    /// If the default cannot be parsed, which no input can cause.
    pub(super) fn take<T>(
        &mut self,
        section: &'static str,
        name: &'static str,
        variables: &[&str],
        default: &str,
        parse: impl Fn(&Raw) -> Result<T, String>,
    ) -> T {
        self.take_optional(section, name, variables, &parse)
            .unwrap_or_else(|| parse(&Raw::Variable(default.into())).unwrap_or_else(|problem| panic!("default of {section}.{name} {problem}")))
    }

    /// Takes a key without a default. After a fault it is absent too; the fault is kept for [`Reader::finish`].
    pub(super) fn take_optional<T>(
        &mut self,
        section: &'static str,
        name: &'static str,
        variables: &[&str],
        parse: impl Fn(&Raw) -> Result<T, String>,
    ) -> Option<T> {
        let key = Key { section, name };
        let written = self.claim(key).map(|value| (self.file.clone(), Raw::File(value)));
        let (origin, raw) = self.variable(key, variables).or(written).unzip();
        self.taken.insert(
            key,
            Taken {
                origin,
                #[cfg(test)]
                is_secret: false,
            },
        );
        parse(&raw?).map_err(|problem| self.fault(section, name, &problem)).ok()
    }

    /// Takes a list of tables, each of them read by `read`, in the order of the file.
    pub(super) fn take_list<T>(&mut self, section: &'static str, name: &'static str, read: impl Fn(&mut Entry) -> T) -> Vec<T> {
        let tables = self.take_optional(section, name, &[], tables).unwrap_or_default();
        let mut list = Vec::new();
        for (table, number) in tables.into_iter().zip(1_usize..) {
            let mut entry = Entry::new(format!("{section}.{name}[{number}]"), table);
            list.push(read(&mut entry));
            let faults = entry.finish().into_iter().map(|(key, problem)| Fault { key, origin: self.file.clone(), problem });
            self.faults.extend(faults);
        }
        list
    }

    /// Takes a key that only the environment may set.
    pub(super) fn take_secret(&mut self, section: &'static str, name: &'static str, variable: &str, min_chars: usize) -> Option<Secret> {
        let text = self.take_secret_text(section, name, variable)?;
        if text.chars().count() < min_chars {
            self.fault(section, name, &format!("is too short, expected at least {min_chars} characters"));
        }
        if text.trim() != text || text.contains(char::is_control) {
            self.fault(section, name, "has white space around it or control characters, expected none");
        }
        Some(Secret::new(text))
    }

    /// The same for a secret of several lines, which the caller judges.
    pub(super) fn take_secret_lines(&mut self, section: &'static str, name: &'static str, variable: &str) -> Option<Secret> {
        self.take_secret_text(section, name, variable).map(Secret::new)
    }

    fn take_secret_text(&mut self, section: &'static str, name: &'static str, variable: &str) -> Option<String> {
        let key = Key { section, name };
        if self.claim(key).is_some() {
            let problem = format!("is a secret, which no file may hold, set {variable} in the environment");
            self.faults.push(Fault { key: key.to_string(), origin: self.file.clone(), problem });
        }
        let (origin, raw) = self.variable(key, &[variable]).unzip();
        self.taken.insert(
            key,
            Taken {
                origin,
                #[cfg(test)]
                is_secret: true,
            },
        );
        match raw? {
            Raw::Variable(text) => Some(text),
            Raw::File(_) => None,
        }
    }

    /// Whether something other than the default gave this key its value, valid or not.
    pub(super) fn is_set(&self, section: &'static str, name: &'static str) -> bool {
        self.taken.get(&Key { section, name }).is_some_and(|taken| taken.origin.is_some())
    }

    /// Notes a fault in a key that was taken.
    pub(super) fn fault(&mut self, section: &'static str, name: &'static str, problem: &str) {
        let key = Key { section, name };
        let origin = self.taken.get(&key).and_then(|taken| taken.origin.clone());
        let origin = origin.unwrap_or_else(|| "the default".into());
        self.faults.push(Fault { key: key.to_string(), origin, problem: problem.into() });
    }

    /// Every key that was taken.
    #[cfg(test)]
    pub(super) fn taken(&self) -> &BTreeMap<Key, Taken> {
        &self.taken
    }

    /// # Errors
    /// All faults so far, and one for each key or variable that nobody took.
    pub(super) fn finish(mut self) -> Result<(), ConfigError> {
        self.refuse_unknown_keys();
        self.refuse_unknown_variables();
        if self.faults.is_empty() { Ok(()) } else { Err(ConfigError::Invalid(self.faults)) }
    }

    fn claim(&mut self, key: Key) -> Option<Value> {
        self.unclaimed.get_mut(key.section)?.as_table_mut()?.remove(key.name)
    }

    fn variable(&self, key: Key, variables: &[&str]) -> Option<(String, Raw)> {
        let own = key.variable();
        let name = [own.as_str()].into_iter().chain(variables.iter().copied()).find(|name| self.env.get(name).is_some())?;
        Some((name.to_owned(), Raw::Variable(self.env.get(name)?.to_owned())))
    }

    fn refuse_unknown_keys(&mut self) {
        let is_section = |name: &str| self.taken.keys().any(|key| key.section == name);
        let mut faults = Vec::new();
        for (name, value) in &self.unclaimed {
            let paths = match value.as_table() {
                Some(section) if section.is_empty() && is_section(name) => continue,
                Some(section) => leaves(name, section),
                None => vec![name.clone()],
            };
            for path in paths {
                let problem = match self.nearest(&path) {
                    _ if is_section(&path) => format!("is not a section, expected [{path}] and its keys"),
                    Some(key) => format!("unknown key, did you mean {key}?"),
                    None => "unknown key".into(),
                };
                faults.push(Fault { key: path, origin: self.file.clone(), problem });
            }
        }
        self.faults.append(&mut faults);
    }

    fn refuse_unknown_variables(&mut self) {
        for name in self.env.names() {
            let Some(tail) = name.strip_prefix(PREFIX) else { continue };
            if self.taken.keys().any(|key| key.variable() == name) {
                continue;
            }
            let path = tail.to_ascii_lowercase().replace("__", ".");
            let problem = match self.nearest(&path) {
                Some(key) => format!("unknown key, did you mean {}?", key.variable()),
                None => "unknown key".into(),
            };
            self.faults.push(Fault { key: path, origin: name.into(), problem });
        }
    }

    /// The key that was probably meant: of the same name in another section, or at most two letters away.
    fn nearest(&self, path: &str) -> Option<Key> {
        let name = path.rsplit('.').next().unwrap_or(path);
        self.taken
            .keys()
            .map(|key| (edit_distance(&key.to_string(), path), *key))
            .filter(|(distance, key)| key.name == name || *distance <= 2)
            .min()
            .map(|(_, key)| key)
    }
}

/// The dotted paths of all values below `path`; an empty table counts as a value.
fn leaves(path: &str, table: &Table) -> Vec<String> {
    if table.is_empty() {
        return vec![path.to_owned()];
    }
    let below = table.iter().map(|(name, value)| (format!("{path}.{name}"), value));
    below.flat_map(|(path, value)| value.as_table().map_or_else(|| vec![path.clone()], |table| leaves(&path, table))).collect()
}

/// Levenshtein's distance, in bytes.
pub(super) fn edit_distance(left: &str, right: &str) -> usize {
    let mut row: Vec<usize> = (1..=right.len()).collect();
    for (index, a) in left.bytes().enumerate() {
        let (mut diagonal, mut before) = (index, index + 1);
        for (cell, b) in row.iter_mut().zip(right.bytes()) {
            let cost = (diagonal + usize::from(a != b)).min(before + 1).min(*cell + 1);
            diagonal = std::mem::replace(cell, cost);
            before = cost;
        }
    }
    row.last().copied().unwrap_or(left.len())
}
