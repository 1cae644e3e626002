//! Whether every row has its file, and every file its row.

use std::collections::HashSet;
use std::io::ErrorKind;
use std::path::Path;

use super::Finding;
use crate::app::{SERVER_ID_FILE, SERVER_ID_LENGTH};
use crate::config::{Config, DatabaseUrl, StorageConfig};
use crate::db::rows::Host;
use crate::db::{DbError, Store};
use crate::ids::ServerId;
use crate::keys;
use crate::recording::repair::look;
use crate::recording::root::Root;
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
    /// Directories and files, each with what the file system says.
    unread: Names,
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
    let root = match Root::open(directory) {
        Ok(root) => root,
        Err(error) => {
            missing.unread.add(&format!("{} ({error})", directory.display()));
            return Ok(());
        }
    };
    let mut after = String::new();
    loop {
        let rows = store.segment_files(container.as_str(), after, i64::try_from(PAGE).unwrap_or(i64::MAX)).await?;
        let Some((last, _)) = rows.last() else { break };
        after = last.clone();
        for (_, path) in &rows {
            match root.open_file(Path::new(path)) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::NotFound => missing.rows_without_files.add(path),
                Err(error) => missing.unread.add(&format!("{path} ({error})")),
            }
        }
    }
    let mut found = look(directory);
    // Both kinds of video lie in one directory, which is told of once.
    if container != Container::Ivf {
        found.unread.iter().for_each(|(directory, error)| missing.unread.add(&format!("{} ({error})", directory.display())));
    }
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
    let gone = [missing.rows_without_files.tell("rows have no file"), missing.unread.tell("cannot be read")];
    let gone: Vec<String> = gone.into_iter().flatten().collect();
    let unknown = missing.files_without_rows.tell("files have no row");
    let (is_fault, is_note) = (!gone.is_empty(), unknown.is_some());
    words = vec![words.join("; ")];
    words.extend(gone.into_iter().chain(unknown));
    let words = words.join("\n");
    match (is_fault, is_note) {
        (true, _) => Finding::Fault(words),
        (false, true) => Finding::Note(words),
        (false, false) => Finding::Fine(words),
    }
}
