//! Owns what an operator can choose: every key, its range, its default and where its value came from.
//!
//! [`Config::load`] is the only door. A value comes from `LIVE_MEETING__SECTION__KEY`, else from the original system's
//! variable, else from the file, else from the default written here; `config.toml` repeats all of it for the reader
//! and a test holds the two equal. Anything unknown, contradictory or out of range stops the start, all faults at once.
//! Secrets come from the environment alone. After start-up nothing reads a file or the environment again: each part of
//! the server is handed its own section.

mod database_url;
mod entry;
mod env;
mod error;
mod livekit;
mod reader;
mod rules;
mod secret;
#[cfg(test)]
mod tests;
mod value;

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::Table;

pub use self::database_url::DatabaseUrl;
pub use self::env::Env;
pub use self::error::{ConfigError, Fault};
pub use self::livekit::LiveKitConfig;
pub use self::secret::Secret;

use self::reader::Reader;
use self::value::{base_url, choice, duration, flag, min_free, origins, path, real, size, text, url, whole};
use crate::video::codec::Container;

/// Read from the working directory when no file is named.
const DEFAULT_FILE: &str = "config.toml";

/// Variables of the original system whose part does not exist here yet.
const NOT_BUILT: [(&str, &str); 4] = [
    ("AUDIO_PIPELINE_PAYLOAD", "Imentiv dispatch"),
    ("AUDIO_PIPELINE_TIMEOUT_MS", "Imentiv dispatch"),
    ("IMENTIV_ENDPOINT_URL", "Imentiv dispatch"),
    ("IMENTIV_API_KEY", "Imentiv dispatch"),
];

/// A valid configuration and what the operator should be told about it.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    pub config: Config,
    /// Sentences for the log; they name variables, never their values.
    pub notices: Vec<String>,
}

/// Everything the server can be told, valid as a whole.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    pub http: HttpConfig,
    pub database: DatabaseConfig,
    pub storage: StorageConfig,
    pub livekit: LiveKitConfig,
    pub ingest: IngestConfig,
    pub recording: RecordingConfig,
    pub analysis: AnalysisConfig,
    pub hume: HumeConfig,
    pub secrets: Secrets,
}

/// The one listening socket, for LiveKit and operators alike.
#[derive(Debug, Clone, PartialEq)]
pub struct HttpConfig {
    pub host: String,
    /// 0 asks the system for any free port.
    pub port: u16,
    /// `None` is one worker per core.
    pub workers: Option<usize>,
    /// Per worker.
    pub max_connections: usize,
    /// Exact origins as browsers send them; empty forbids every cross-origin call.
    pub cors_origins: Vec<String>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct DatabaseConfig {
    pub url: DatabaseUrl,
    /// The size of PostgreSQL's pool; SQLite does not read it.
    pub connections: u32,
}

/// Where files go. Missing directories are made at start-up, elsewhere.
#[derive(Debug, Clone, PartialEq)]
pub struct StorageConfig {
    /// Holds the keys the server makes for itself.
    pub dir: PathBuf,
    pub audio_dir: PathBuf,
    pub video_dir: PathBuf,
    pub pipeline_log_dir: PathBuf,
    /// What must be free where recordings go, else new ones are refused.
    pub min_free: MinFree,
    /// What may wait for the database on the disk, in bytes.
    pub journal_max: u64,
}

/// How much of a file system new recordings leave alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MinFree {
    /// 1 GiB, or 2 % where that is more.
    Auto,
    /// 0 refuses nothing.
    Bytes(u64),
}

impl MinFree {
    const AUTO_BYTES: u64 = 1 << 30;
    const AUTO_SHARE: u64 = 50;

    /// Of a file system of this size.
    pub fn bytes_of(self, total_bytes: u64) -> u64 {
        match self {
            Self::Auto => Self::AUTO_BYTES.max(total_bytes / Self::AUTO_SHARE),
            Self::Bytes(bytes) => bytes,
        }
    }
}

/// The sockets, `WS /egress-audio` and `WS /egress-video`.
#[derive(Debug, Clone, PartialEq)]
pub struct IngestConfig {
    pub auth: IngestAuth,
    /// Where LiveKit's egress reaches this server: ws or wss, without a trailing slash.
    pub ws_base: Option<String>,
    /// Times the declared byte rate.
    pub max_speed: f64,
    /// After this long without audio a connection's track may be taken over by another.
    pub stall_after: Duration,
    /// After this long without a frame the connection is closed; never shorter than `stall_after`.
    pub idle_timeout: Duration,
    /// Audio that waits for a stalled disk, all tracks together, in bytes.
    pub spool: u64,
}

/// Who may open an audio socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IngestAuth {
    /// The holder of a signed ticket.
    Ticket,
    /// Whoever reaches the port.
    Open,
}

#[derive(Debug, Clone, PartialEq)]
pub struct RecordingConfig {
    pub mute: MuteMode,
    /// Of audio, then the next file begins.
    pub segment_duration: Duration,
    /// A longer silence of a sender is not filled: a new file begins.
    pub longest_fill: Duration,
    /// Audio that waits for a stalled disk, per track.
    pub spool_per_track: Duration,
}

/// What becomes of the zeros that LiveKit sends while a track is muted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MuteMode {
    /// They are recorded, as holes that cost no disk.
    Keep,
    /// They are cut out, and the gap is recorded.
    Pause,
}

#[derive(Debug, Clone, PartialEq)]
pub struct AnalysisConfig {
    /// False turns off every analysis; then no group audio is kept.
    pub enabled: bool,
    /// The length of a group where the connection does not choose one.
    pub group_seconds: f64,
    /// A group ends early at this size, in bytes.
    pub group_bytes: u64,
    /// Of the copy for analysis, never of the recording.
    pub normalize: bool,
}

/// Hume's streaming service; its key is in [`Secrets`], and there is none without a `url`.
#[derive(Debug, Clone, PartialEq)]
pub struct HumeConfig {
    pub url: Option<String>,
    /// A PEM file of certificate authorities to trust besides the built-in ones.
    pub ca_file: Option<PathBuf>,
    /// Audio that waits per track while the service is down; then the oldest is dropped.
    pub queue: Duration,
    /// After a 401 or 403 one connection of the whole process tries again this often.
    pub refused_retry: Duration,
}

/// What only the environment may hold.
#[derive(Debug, Clone, PartialEq)]
pub struct Secrets {
    pub livekit_api_secret: Option<Secret>,
    /// All of LiveKit's keys by name, each once; the pair of [`LiveKitConfig::api_key`] first.
    pub livekit_keys: Vec<(String, Secret)>,
    pub hume_api_key: Option<Secret>,
    /// `None` lets the server make one.
    pub admin_api_key: Option<Secret>,
    /// `None` lets the server make one.
    pub ingest_ticket_secret: Option<Secret>,
}

impl Config {
    /// Reads `file`, or `config.toml` of the working directory where that exists, under the variables of `env`.
    ///
    /// # Errors
    /// All faults of file and variables at once; or a file that is missing though named, unreadable or not TOML.
    pub fn load(file: Option<&Path>, env: &Env) -> Result<Loaded, ConfigError> {
        let path = file.unwrap_or(Path::new(DEFAULT_FILE));
        let table = match read_table(path) {
            Err(ConfigError::Unreadable { source, .. }) if file.is_none() && source.kind() == ErrorKind::NotFound => Table::new(),
            outcome => outcome?,
        };
        let config = Self::from_table(table, path, env)?;
        let notices = NOT_BUILT
            .iter()
            .filter(|(variable, _)| env.get(variable).is_some())
            .map(|(variable, part)| format!("{variable} is set but has no effect yet: {part} is not built"))
            .collect();
        Ok(Loaded { config, notices })
    }

    fn from_table(table: Table, path: &Path, env: &Env) -> Result<Self, ConfigError> {
        let mut reader = Reader::new(table, path, env);
        let config = Self::read(&mut reader);
        config.refuse_contradictions(&mut reader);
        reader.finish()?;
        Ok(config)
    }

    fn read(reader: &mut Reader) -> Self {
        let mut config = Self {
            http: HttpConfig::read(reader),
            database: DatabaseConfig::read(reader),
            storage: StorageConfig::read(reader),
            livekit: LiveKitConfig::read(reader),
            ingest: IngestConfig::read(reader),
            recording: RecordingConfig::read(reader),
            analysis: AnalysisConfig::read(reader),
            hume: HumeConfig::read(reader),
            secrets: Secrets::read(reader),
        };
        config.join_livekit_keys(reader);
        config
    }

    /// What no single key can know. It asks whether a key *is set*, not for its value, so that a fault in the value is
    /// not reported twice.
    fn refuse_contradictions(&self, reader: &mut Reader) {
        match (reader.is_set("livekit", "api_key"), reader.is_set("livekit", "api_secret")) {
            (true, false) => reader.fault("livekit", "api_key", "stands without livekit.api_secret, set LIVEKIT_API_SECRET"),
            (false, true) => reader.fault("livekit", "api_secret", "stands without livekit.api_key, set LIVEKIT_API_KEY"),
            (true, true) | (false, false) => {}
        }
        if self.livekit.min_starts > self.livekit.max_starts {
            reader.fault("livekit", "min_starts", "is above livekit.max_starts, expected at most as many");
        }
        if reader.is_set("hume", "api_key") && !reader.is_set("hume", "url") {
            reader.fault(
                "hume",
                "api_key",
                "stands without hume.url, set HUME_WS_URL: there is no default, since Hume's old endpoint \
                 wss://api.hume.ai/v0/stream/models was switched off in June 2026",
            );
        }
        if self.ingest.idle_timeout < self.ingest.stall_after {
            reader.fault("ingest", "idle_timeout", "is shorter than ingest.stall_after, expected at least as long");
        }
    }
}

/// The configuration of an empty file in an empty environment.
impl Default for Config {
    fn default() -> Self {
        Self::from_table(Table::new(), Path::new(DEFAULT_FILE), &Env::default()).expect("the defaults are in range and agree with each other")
    }
}

impl HttpConfig {
    fn read(reader: &mut Reader) -> Self {
        Self {
            host: reader.take("http", "host", &["HOST"], "0.0.0.0", text),
            port: reader.take("http", "port", &["PORT"], "3001", whole(0..=u16::MAX)),
            workers: reader.take_optional("http", "workers", &[], whole(1..=256)),
            max_connections: reader.take("http", "max_connections", &[], "25000", whole(1..=1_000_000)),
            cors_origins: reader.take_optional("http", "cors_origins", &[], origins).unwrap_or_default(),
        }
    }
}

impl DatabaseConfig {
    fn read(reader: &mut Reader) -> Self {
        let url = |raw: &value::Raw| text(raw)?.parse();
        Self {
            url: reader.take("database", "url", &["DATABASE_URL"], "sqlite:storage/live-meeting.db", url),
            connections: reader.take("database", "connections", &[], "10", whole(1..=200)),
        }
    }
}

impl StorageConfig {
    fn read(reader: &mut Reader) -> Self {
        let (audio, video, logs) = (["EGRESS_AUDIO_OUTPUT_DIR"], ["EGRESS_VIDEO_OUTPUT_DIR"], ["PIPELINE_LOG_DIR"]);
        Self {
            dir: reader.take("storage", "dir", &[], "storage", path),
            audio_dir: reader.take("storage", "audio_dir", &audio, "storage/egress/audio", path),
            video_dir: reader.take("storage", "video_dir", &video, "storage/egress/video", path),
            pipeline_log_dir: reader.take("storage", "pipeline_log_dir", &logs, "storage/pipeline-logs", path),
            min_free: reader.take("storage", "min_free", &[], "auto", min_free),
            journal_max: reader.take("storage", "journal_max", &[], "1GiB", size("1MiB", "1TiB")),
        }
    }

    /// Where recordings of a kind lie.
    pub fn dir_of(&self, container: Container) -> &Path {
        if container.is_video() { &self.video_dir } else { &self.audio_dir }
    }
}

impl IngestConfig {
    fn read(reader: &mut Reader) -> Self {
        let auth = choice([("ticket", IngestAuth::Ticket), ("open", IngestAuth::Open)]);
        Self {
            auth: reader.take("ingest", "auth", &[], "ticket", auth),
            ws_base: reader.take_optional("ingest", "ws_base", &["EGRESS_WS_BASE"], base_url(&["ws", "wss"])),
            max_speed: reader.take("ingest", "max_speed", &[], "8", real(1.0..=1000.0)),
            stall_after: reader.take("ingest", "stall_after", &[], "5s", duration("1s", "60s")),
            idle_timeout: reader.take("ingest", "idle_timeout", &[], "75s", duration("5s", "1h")),
            spool: reader.take("ingest", "spool", &[], "512MiB", size("1MiB", "64GiB")),
        }
    }
}

impl RecordingConfig {
    fn read(reader: &mut Reader) -> Self {
        let mute = choice([("keep", MuteMode::Keep), ("pause", MuteMode::Pause)]);
        Self {
            mute: reader.take("recording", "mute", &[], "keep", mute),
            segment_duration: reader.take("recording", "segment_duration", &[], "1h", duration("1s", "3h")),
            longest_fill: reader.take("recording", "longest_fill", &[], "5m", duration("1s", "1h")),
            spool_per_track: reader.take("recording", "spool_per_track", &[], "30s", duration("1s", "5m")),
        }
    }
}

impl AnalysisConfig {
    fn read(reader: &mut Reader) -> Self {
        let (seconds, normalize) = (["AUDIO_PIPELINE_GROUP_SECONDS"], ["AUDIO_PIPELINE_NORMALIZE"]);
        Self {
            enabled: reader.take("analysis", "enabled", &[], "true", flag),
            group_seconds: reader.take("analysis", "group_seconds", &seconds, "2", real(0.1..=30.0)),
            group_bytes: reader.take("analysis", "group_bytes", &[], "4MiB", size("4KiB", "64MiB")),
            normalize: reader.take("analysis", "normalize", &normalize, "false", flag),
        }
    }
}

impl HumeConfig {
    fn read(reader: &mut Reader) -> Self {
        Self {
            url: reader.take_optional("hume", "url", &["HUME_WS_URL"], url(&["ws", "wss"])),
            ca_file: reader.take_optional("hume", "ca_file", &[], path),
            queue: reader.take("hume", "queue", &[], "30s", duration("1s", "10m")),
            refused_retry: reader.take("hume", "refused_retry", &[], "5m", duration("1s", "1h")),
        }
    }
}

impl Secrets {
    fn read(reader: &mut Reader) -> Self {
        Self {
            livekit_api_secret: reader.take_secret("livekit", "api_secret", "LIVEKIT_API_SECRET", 1),
            // Read when the pair is known.
            livekit_keys: Vec::new(),
            hume_api_key: reader.take_secret("hume", "api_key", "HUME_API_KEY", 1),
            admin_api_key: reader.take_secret("http", "admin_api_key", "ADMIN_API_KEY", 16),
            ingest_ticket_secret: reader.take_secret("ingest", "ticket_secret", "INGEST_TICKET_SECRET", 32),
        }
    }
}

fn read_table(path: &Path) -> Result<Table, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::unreadable(path, source))?;
    text.parse().map_err(|error| ConfigError::not_toml(path, &text, &error))
}
