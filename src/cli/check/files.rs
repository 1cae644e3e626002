//! Whether every row has its file, and every file its row.

use std::collections::HashSet;
use std::path::Path;

use super::Finding;
use crate::app::{SERVER_ID_FILE, SERVER_ID_LENGTH};
use crate::config::{Config, DatabaseUrl, StorageConfig};
use crate::db::rows::Host;
use crate::db::{DbError, Store};
use crate::ids::ServerId;
use crate::keys;
use crate::recording::path::below;
use crate::recording::repair::look;
use crate::video::codec::Container;

/// Rows, or files, that are asked for at once.
const PAGE: usize = 500;
/// Names that are told; the rest is counted.
const NAMES: usize = 3;

/// Files and rows that miss each other.
#[derive(Debug, Default)]
struct Missing {
    rows_without_files: Names,
    files_without_rows: Names,
    files: usize,
    unfinished: usize,
    recovered: i64,
    suspect: i64,
}

#[derive(Debug, Default)]
struct Names {
    count: usize,
    first: Vec<String>,
}

impl Names {
    fn add(&mut self, name: &str) {
        self.count += 1;
        if self.first.len() < NAMES {
            self.first.push(name.to_owned());
        }
    }

    fn tell(&self, what: &str) -> Option<String> {
        let more = if self.count > self.first.len() { ", …" } else { "" };
        (self.count > 0).then(|| format!("{} {what}: {}{more}", self.count, self.first.join(", ")))
    }
}

/// Looks, and changes nothing. `None` where there is no database yet, or one that is not up to date.
pub(super) async fn find(config: &Config) -> Option<Finding> {
    let url = &config.database.url;
    if matches!(url, DatabaseUrl::Sqlite(path) if !path.exists()) || !matches!(Store::pending_migrations(url).await, Ok(0)) {
        return None;
    }
    let Ok(Some(id)) = keys::load(&config.storage.dir.join(SERVER_ID_FILE)) else { return None };
    let server = ServerId::new(id.expose().chars().take(SERVER_ID_LENGTH).collect::<String>());
    Some(match compare(url, server, &config.storage).await {
        Ok(missing) => tell(&missing),
        Err(error) => Finding::Fault(format!("cannot be compared with the rows: {error}")),
    })
}

async fn compare(url: &DatabaseUrl, server: ServerId, storage: &StorageConfig) -> Result<Missing, DbError> {
    let store = Store::open(url, 1).await?.on_behalf_of(Host { server, autopilot: None });
    let mut missing = Missing::default();
    for container in [Container::Wav, Container::H264, Container::Ivf] {
        compare_files(&store, container, storage.dir_of(container), &mut missing).await?;
    }
    (missing.recovered, missing.suspect) = store.doubtful_files().await?;
    Ok(missing)
}

async fn compare_files(store: &Store, container: Container, directory: &Path, missing: &mut Missing) -> Result<(), DbError> {
    let mut after = String::new();
    loop {
        let rows = store.segment_files(container.as_str(), after, i64::try_from(PAGE).unwrap_or(i64::MAX)).await?;
        let Some((last, _)) = rows.last() else { break };
        after = last.clone();
        for (_, path) in &rows {
            if !below(directory, path).is_some_and(|path| path.exists()) {
                missing.rows_without_files.add(path);
            }
        }
    }
    let mut found = look(directory);
    for files in [&mut found.unsealed, &mut found.sealed] {
        files.retain(|file| Container::of(file) == container);
    }
    missing.unfinished += found.unsealed.len();
    let relative = |path: &Path| path.strip_prefix(directory).unwrap_or(path).to_string_lossy().into_owned();
    let files: Vec<String> = found.sealed.iter().chain(&found.unsealed).map(|path| relative(path)).collect();
    missing.files += files.len();
    for files in files.chunks(PAGE) {
        let known: HashSet<String> = store.paths_with_rows(container.as_str(), files.to_vec()).await?.into_iter().collect();
        files.iter().filter(|file| !known.contains(*file)).for_each(|file| missing.files_without_rows.add(file));
    }
    Ok(())
}

fn tell(missing: &Missing) -> Finding {
    let mut words = vec![format!("{} files, {} of them not finished or without a sidecar", missing.files, missing.unfinished)];
    if missing.recovered + missing.suspect > 0 {
        words.push(format!("{} are recovered, {} suspect", missing.recovered, missing.suspect));
    }
    let faults = [missing.rows_without_files.tell("rows have no file"), missing.files_without_rows.tell("files have no row")];
    let faults: Vec<String> = faults.into_iter().flatten().collect();
    if faults.is_empty() {
        return Finding::Fine(words.join("; "));
    }
    words.extend(faults);
    Finding::Note(words.join("\n"))
}
