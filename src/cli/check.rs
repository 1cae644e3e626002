//! `live-meeting check`

mod files;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use chrono::{DateTime, SecondsFormat};

use super::{ConfigArg, environment, start_logging};
use crate::app::{ADMIN_KEY_FILE, TICKET_KEY_FILE};
use crate::config::{Config, DatabaseUrl, IngestAuth, Secret};
use crate::db::{DbError, Store};
use crate::journal::{self, Waiting};
use crate::keys;
use crate::livekit::api::{LiveKit, LiveKitAccess};
use crate::recording::disk::Disk;
use crate::recording::root::Root;

/// How long the database may take for each question: one that is stopped takes connections and says nothing.
const DATABASE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long LiveKit may take to list its rooms.
const LIVEKIT_TIMEOUT: Duration = Duration::from_secs(5);

/// Exits with 1 if anything is at fault.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "Exits with 1 if anything is at fault. Makes neither keys nor a database.")]
pub struct CheckArgs {
    #[command(flatten)]
    config: ConfigArg,
}

/// How a part is.
enum Finding {
    Fine(String),
    /// Works, but an operator may not want it so.
    Note(String),
    Fault(String),
}

pub async fn run(args: CheckArgs) -> anyhow::Result<ExitCode> {
    let env = environment()?;
    start_logging(&env, "error");
    let loaded = match Config::load(args.config.config.as_deref(), &env) {
        Ok(loaded) => loaded,
        Err(error) => {
            show("configuration", &Finding::Fault(format!("{:#}", anyhow::Error::from(error))));
            return Ok(ExitCode::FAILURE);
        }
    };
    let config = loaded.config;
    let mut findings = vec![("configuration", Finding::Fine("every key and value is understood".to_owned()))];
    findings.extend(loaded.notices.into_iter().map(|notice| ("configuration", Finding::Note(notice))));
    let database = database(&config.database.url).await;
    let database_answers = !matches!(database, Finding::Fault(_));
    findings.push(("database", database));
    for (name, directory) in [
        ("storage", &config.storage.dir),
        ("audio directory", &config.storage.audio_dir),
        ("video directory", &config.storage.video_dir),
        ("pipeline logs", &config.storage.pipeline_log_dir),
    ] {
        findings.push((
            name,
            match Root::open(directory).and_then(|root| root.probe()) {
                Ok(()) => Finding::Fine(format!("{} can be written", directory.display())),
                Err(error) => Finding::Fault(format!("{} cannot be written: {error}", directory.display())),
            },
        ));
    }
    findings.push(("space", space(&config)));
    if database_answers && let Some(files) = files::find(&config).await {
        findings.push(("recordings", files));
    }
    findings.push(("journal", journal(&config.storage.dir.join(journal::DIRECTORY))));
    findings.push(("admin key", key(config.secrets.admin_api_key.as_ref(), "ADMIN_API_KEY", &config, ADMIN_KEY_FILE)));
    findings.push(("ticket key", key(config.secrets.ingest_ticket_secret.as_ref(), "INGEST_TICKET_SECRET", &config, TICKET_KEY_FILE)));
    findings.push((
        "ingest",
        match config.ingest.auth {
            IngestAuth::Ticket => Finding::Fine("open to tickets only".to_owned()),
            IngestAuth::Open => Finding::Note("ingest.auth is \"open\": whoever reaches this server can record on it".to_owned()),
        },
    ));
    findings.push(("webhooks", webhooks(&config)));
    findings.push(("LiveKit", livekit(&config).await));
    findings.push(("autopilot", autopilot(&config).await));
    findings.push((
        "Hume",
        match (&config.secrets.hume_api_key, &config.hume.url) {
            (Some(_), Some(url)) if config.analysis.enabled => Finding::Fine(format!("audio is streamed to {url} (not tried)")),
            (Some(_), _) => Finding::Note("not used: analysis.enabled is false".to_owned()),
            (None, _) => Finding::Note("not used: HUME_API_KEY is missing".to_owned()),
        },
    ));
    for (name, finding) in &findings {
        show(name, finding);
    }
    let at_fault = findings.iter().filter(|(_, finding)| matches!(finding, Finding::Fault(_))).count();
    if at_fault > 0 {
        eprintln!("{at_fault} at fault");
    }
    Ok(if at_fault == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn show(name: &str, finding: &Finding) {
    let (mark, text) = match finding {
        Finding::Fine(text) => ("ok   ", text),
        Finding::Note(text) => ("note ", text),
        Finding::Fault(text) => ("FAULT", text),
    };
    println!("{mark}  {name:<16}{}", text.replace('\n', "\n                       "));
}

async fn database(url: &DatabaseUrl) -> Finding {
    let name = url.redacted();
    if let DatabaseUrl::Sqlite(path) = url
        && !path.exists()
    {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        return match Root::open(parent).and_then(|root| root.probe()) {
            Ok(()) => Finding::Fine(format!("{name} does not exist yet; it is made at the first start")),
            Err(error) => Finding::Fault(format!("{name} does not exist and cannot be made: {error}")),
        };
    }
    match in_time(Store::pending_migrations(url)).await {
        Ok(0) => match in_time(takes_writes(url)).await {
            Ok(()) => Finding::Fine(format!("{name} is reached, up to date, and takes writes")),
            Err(error) => Finding::Fault(format!("{name}: {error}")),
        },
        Ok(pending) => Finding::Fine(format!("{name} is reached; {pending} migrations run at the next start")),
        Err(error) => Finding::Fault(format!("{name}: {error}")),
    }
}

async fn in_time<T>(answer: impl Future<Output = Result<T, DbError>>) -> Result<T, DbError> {
    tokio::time::timeout(DATABASE_TIMEOUT, answer).await.unwrap_or(Err(DbError::Late(DATABASE_TIMEOUT)))
}

/// Nothing is migrated by it: the database is up to date.
async fn takes_writes(url: &DatabaseUrl) -> Result<(), DbError> {
    Store::open(url, 1).await?.probe().await
}

/// Whether a recording would be begun, by the room that there is.
fn space(config: &Config) -> Finding {
    match Root::open(&config.storage.audio_dir).and_then(|root| Disk::new(root, config.storage.min_free).measure()) {
        Ok(space) if space.is_low() => Finding::Fault(format!("{space}: recordings would be refused")),
        Ok(space) => Finding::Fine(space.to_string()),
        Err(error) => Finding::Fault(format!("it cannot be measured: {error}")),
    }
}

/// What waits for the database, of a server that runs or of an earlier run.
fn journal(dir: &Path) -> Finding {
    match journal::look(dir) {
        Ok(Waiting { corrupt, .. }) if corrupt > 0 => Finding::Fault(format!("{} has {corrupt} parts that are no records", dir.display())),
        Ok(Waiting { set_aside, .. }) if set_aside > 0 => {
            Finding::Fault(format!("{set_aside} parts could not be used and are set aside as .bad files in {}", dir.display()))
        }
        Ok(Waiting { records: 0, .. }) => Finding::Fine("nothing waits for the database".to_owned()),
        Ok(Waiting { records, bytes, oldest_ms, .. }) => {
            let since = oldest_ms
                .and_then(DateTime::from_timestamp_millis)
                .map_or_else(String::new, |since| format!(", the oldest since {}", since.to_rfc3339_opts(SecondsFormat::Secs, true)));
            Finding::Note(format!("{records} records ({bytes} bytes) wait for the database in {}{since}", dir.display()))
        }
        Err(error) => Finding::Fault(format!("{} cannot be read: {error}", dir.display())),
    }
}

fn key(set: Option<&Secret>, variable: &str, config: &Config, file: &str) -> Finding {
    let path = config.storage.dir.join(file);
    match (set, keys::load(&path)) {
        (Some(_), _) => Finding::Fine(format!("{variable} is set")),
        (None, Ok(Some(_))) => Finding::Fine(format!("kept in {}", path.display())),
        (None, Ok(None)) => Finding::Fine(format!("made at the first start, in {}", path.display())),
        (None, Err(error)) => Finding::Fault(error.to_string()),
    }
}

fn webhooks(config: &Config) -> Finding {
    let names: Vec<&str> = config.secrets.livekit_keys.iter().map(|(name, _)| name.as_str()).collect();
    if names.is_empty() {
        return Finding::Note("neither LIVEKIT_API_KEY and LIVEKIT_API_SECRET nor LIVEKIT_KEYS are set: every webhook is refused".to_owned());
    }
    Finding::Fine(format!("believed if they are signed with {}", names.join(" or ")))
}

async fn livekit(config: &Config) -> Finding {
    let Some((key, secret)) = config.livekit.api_key.as_ref().zip(config.secrets.livekit_api_secret.as_ref()) else {
        return Finding::Note("not tried: there is no key".to_owned());
    };
    let Some(url) = &config.livekit.url else {
        return Finding::Note("a key and a secret are set, but not tried: LIVEKIT_URL is not set".to_owned());
    };
    match client(url, key, secret).rooms().await {
        Ok(rooms) => Finding::Fine(format!("{url} accepts the key {key}; {} rooms are open", rooms.len())),
        Err(error) => Finding::Fault(format!("{url}: {error}")),
    }
}

/// Whether tracks are recorded by themselves; if so, whether LiveKit's egress API answers.
async fn autopilot(config: &Config) -> Finding {
    if !config.livekit.autopilot {
        return Finding::Note("off: livekit.autopilot is false".to_owned());
    }
    let missing = config.livekit.missing_for_autopilot(&config.ingest);
    let (Some(url), Some((key, secret)), Some(base)) =
        (&config.livekit.url, config.livekit.api_key.as_ref().zip(config.secrets.livekit_api_secret.as_ref()), &config.ingest.ws_base)
    else {
        return Finding::Note(format!("off: {} is not set", missing.join(" and ")));
    };
    match client(url, key, secret).own_egresses(None, base).await {
        Ok(running) => Finding::Fine(format!("every published track is recorded at {base}; {} egresses send there now", running.len())),
        Err(error) => Finding::Fault(format!("LiveKit does not list its egresses: {error}")),
    }
}

fn client(url: &str, key: &str, secret: &Secret) -> LiveKit {
    let (url, api_key, api_secret) = (url.to_owned(), key.to_owned(), secret.clone());
    LiveKit::new(&LiveKitAccess { url, api_key, api_secret, timeout: LIVEKIT_TIMEOUT })
}
