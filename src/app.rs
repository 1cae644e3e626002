//! The composition root: builds every part, and owns the order of starting and stopping.

mod connections;
mod patience;
mod storage;
mod vital;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use actix::Addr;
use actix_web::dev::ServerHandle;
use actix_web::{App, HttpServer, web};
use sd_notify::NotifyState;
use tokio::task::JoinHandle;

use self::connections::{connections_with, set_timeouts};
use self::patience::{patiently, patiently_at_work};
use self::storage::{directory, disk, shelves, syncer};
use self::vital::{end_with_its_panic, launch_vital};
use crate::actors::buffer::budget::SpoolBudget;
use crate::actors::egress_starter::{EgressStarter, EgressStarterParams, StopStarting};
use crate::actors::reconciler::{Reconciler, ReconcilerParams};
use crate::actors::session_registry::{AttachAutopilot, EventsReplayed, SessionRegistry, StopTracks};
use crate::actors::stats::WriteLag;
use crate::actors::totals::Totals;
use crate::actors::track::video_queue::video_budget;
use crate::actors::track::{Service, TrackResources};
use crate::analysis::connection::AnalysisService;
use crate::analysis::gate::CredentialGate;
use crate::analysis::hume_legacy::HumeLegacy;
use crate::analysis::tls;
use crate::audio::format::PcmFormat;
use crate::config::{Config, IngestAuth, Secret};
use crate::db::rows::Host;
use crate::db::{DbError, Store};
use crate::http::health::{Health, HealthParts};
use crate::http::low_water::SocketHandle;
use crate::http::metrics::{DoorCounts, register_durable, register_kept, register_video_disk};
use crate::http::storage::{Storage, keep_measuring};
use crate::http::{self, Doors};
use crate::ids::ServerId;
use crate::journal::replay::{self, Halt};
use crate::journal::{self, Journal};
use crate::keys::{self, KeptKey};
use crate::livekit::api::{LiveKit, LiveKitAccess};
use crate::livekit::webhook::WebhookVerifier;
use crate::metrics::Metrics;
use crate::recording::append_pool::AppendPool;
use crate::recording::pipeline_log::PipelineLog;
use crate::recording::pulse::DiskPulse;
use crate::sealing::hasher::Hasher;
use crate::sealing::recovery;
use crate::ticket::TicketMint;
use crate::watchdog::{Watchdog, tell_service_manager};

pub const ADMIN_KEY_FILE: &str = "admin-key";
pub const TICKET_KEY_FILE: &str = "ticket-key";
/// Names this server among those that share a database: whoever starts with the same storage directory is the same server, and its earlier run is dead.
pub const SERVER_ID_FILE: &str = "server-id";
/// Of 64 random hexadecimal digits: enough for no two servers to share a name.
pub const SERVER_ID_LENGTH: usize = 12;

/// A request's head must arrive within this.
const HEAD_DEADLINE: Duration = Duration::from_secs(5);
/// When the tracks are sealed, what is left of the connections gets this long.
const CONNECTIONS_DEADLINE_SECONDS: u64 = 1;
/// Tracks seal within their own deadlines; this one is for what hangs, so that the process ends within 10 s.
const TRACKS_DEADLINE: Duration = Duration::from_secs(8);

/// What the spool is to hold of each track when the disk stalls.
const SPOOL_PER_TRACK: Duration = Duration::from_secs(30);

/// How long the last lines of the pipeline log may take.
const LOG_DEADLINE: Duration = Duration::from_secs(1);

/// What keeps a server from starting.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("{what} {path}: {cause}")]
    File { what: &'static str, path: String, cause: std::io::Error },
    #[error("database {url}: {cause}")]
    Database { url: String, cause: DbError },
    #[error("cannot listen on {address}: {cause}; another program may have the port, which PORT changes")]
    Listen { address: String, cause: std::io::Error },
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
    #[error("cannot set up TLS for the analysis service: {0}")]
    Tls(std::io::Error),
}

/// A server that runs.
pub struct Server {
    /// Where it listens; tells the port where the configuration says 0.
    pub address: SocketAddr,
    pub admin_key: Secret,
    pub mint: TicketMint,
    pub store: Store,
    registry: Addr<SessionRegistry>,
    starter: Option<Addr<EgressStarter>>,
    pipeline_log: PipelineLog,
    hasher: Hasher,
    handle: ServerHandle,
    serving: JoinHandle<std::io::Result<()>>,
}

/// Makes directories and keys, opens the database, repairs what an earlier run left open, and listens.
///
/// # Errors
/// Whatever is in the way, with its name.
pub async fn start(config: Config) -> Result<Server, StartError> {
    directory(&config.storage.dir)?;
    let root = directory(&config.storage.audio_dir)?;
    let video_root = directory(&config.storage.video_dir)?;
    let log_root = directory(&config.storage.pipeline_log_dir)?;
    let admin_key = key(config.secrets.admin_api_key.clone(), &config.storage.dir, ADMIN_KEY_FILE)?;
    let mint = TicketMint::new(key(config.secrets.ingest_ticket_secret.clone(), &config.storage.dir, TICKET_KEY_FILE)?);
    let journal = Journal::open(&config.storage.dir, config.storage.journal_max);
    let in_journal = |what, cause| StartError::File { what, path: config.storage.dir.join(journal::DIRECTORY).display().to_string(), cause };
    let journal = journal.map_err(|cause| in_journal("cannot use the journal in", cause))?;
    let database = |cause| StartError::Database { url: config.database.url.redacted(), cause };
    let store = patiently(|| async { Store::open(&config.database.url, config.database.connections).await.map_err(database) }).await?;
    let server: String = key(None, &config.storage.dir, SERVER_ID_FILE)?.expose().chars().take(SERVER_ID_LENGTH).collect();
    let autopilot = autopilot(&config);
    let host = Host { server: ServerId::new(server), autopilot: autopilot.as_ref().map(|_| config.livekit.rules.clone()) };
    let store = store.on_behalf_of(host);
    log::info!("database ready url={}", config.database.url.redacted());
    let halted = |halt| match halt {
        Halt::Database(cause) => database(cause),
        Halt::Disk(cause) => in_journal("cannot read the journal in", cause),
    };
    patiently(|| async { replay::write_rows(&journal, &store).await.map_err(halted) }).await?;
    let shelves = shelves(&root, &video_root);
    let remaining = patiently_at_work(|| async { recovery::recover(&store, &shelves).await.map_err(database) }).await?;

    let watchdog = Watchdog::start().map_err(StartError::Thread)?;
    watchdog.watch_this_thread();
    let pipeline_log = PipelineLog::start(log_root).map_err(StartError::Thread)?;
    let metrics = Metrics::default();
    let (disk, video_disk) = (disk(&config, root.clone()), disk(&config, video_root.clone()));
    let totals = Arc::new(Totals::registered(&metrics));
    let (budget, lag) = (Arc::new(spool(&config)), Arc::<WriteLag>::default());
    register_kept(&metrics, &budget, &lag, &disk, &pipeline_log);
    let syncer = syncer([&root, &video_root]).map_err(StartError::Thread)?;
    register_durable(&metrics, &syncer, &journal, &remaining.unrepaired());
    register_video_disk(&metrics, &video_disk);
    let [storage, video_storage] = [disk, video_disk].map(|disk| {
        actix_rt::spawn(keep_measuring(Arc::clone(&disk)));
        Arc::new(Storage::new(disk))
    });
    let tracks = Arc::new(TrackResources {
        root: root.clone(),
        video_pulse: DiskPulse::of(video_root.clone()),
        video_root,
        ingest: config.ingest.clone(),
        recording: config.recording.clone(),
        analysis: config.analysis.clone(),
        store: store.clone(),
        journal: journal.clone(),
        pipeline_log: pipeline_log.clone(),
        lag,
        totals: Arc::clone(&totals),
        video_budget: Arc::new(video_budget(Arc::clone(&budget))),
        budget,
        syncer: syncer.clone(),
        append_pool: AppendPool::start().map_err(StartError::Thread)?,
        pulse: DiskPulse::of(root.clone()),
        watchdog: watchdog.clone(),
        service: service(&config)?,
    });
    let hasher = Hasher::start(store.clone(), shelves, remaining.looked()).map_err(StartError::Thread)?;
    let registry = launch_vital("registry", SessionRegistry::new(store.clone(), journal.clone(), config.ingest.stall_after));
    vital::watch(&watchdog, &registry);
    replay_into(&registry, journal.clone(), store.clone());
    let livekit = livekit(&config);
    let starter = autopilot.zip(livekit.clone()).map(|(ws_base, livekit)| {
        let params = EgressStarterParams {
            store: store.clone(),
            livekit,
            mint: mint.clone(),
            ws_base: ws_base.clone(),
            config: config.livekit.clone(),
            group_seconds: config.analysis.group_seconds,
            drop: registry.clone().recipient(),
        };
        (launch_vital("starter of egresses", EgressStarter::new(params)), ws_base)
    });
    let reconciler = livekit.map(|livekit| {
        let params = ReconcilerParams {
            store: store.clone(),
            livekit,
            interval: config.livekit.reconcile_interval,
            registry: registry.clone(),
            starter: starter.clone(),
        };
        launch_vital("reconciler", Reconciler::new(params))
    });
    if let Some(reconciler) = &reconciler {
        let attach = AttachAutopilot {
            queue: starter.as_ref().map(|(starter, _)| starter.clone().recipient()),
            sockets: starter.as_ref().map(|(starter, _)| starter.clone().recipient()),
            reconcile: reconciler.clone().recipient(),
            stalled_after: config.livekit.restart_after,
        };
        // The registry has just been started and takes the first message of all.
        if let Err(error) = registry.send(attach).await {
            log::error!("the registry is gone error={error}");
        }
    }
    let doors = web::Data::new(Doors {
        registry: registry.clone(),
        reconciler: reconciler.clone(),
        starter: starter.as_ref().map(|(starter, _)| starter.clone()),
        tracks,
        webhook_verifier: webhook_verifier(&config),
        admin_key: admin_key.clone(),
        mint: mint.clone(),
        ws_base: config.ingest.ws_base.clone(),
        store: store.answering_within(http::DATABASE_PATIENCE),
        health: Health::new(HealthParts {
            store: store.clone(),
            journal,
            storages: [Arc::clone(&storage), Arc::clone(&video_storage)],
            totals,
            syncer,
            unrepaired: remaining.unrepaired(),
            watchdog: watchdog.clone(),
        }),
        storage,
        video_storage,
        counts: DoorCounts::registered(&metrics),
        metrics,
    });
    if config.ingest.auth == IngestAuth::Open {
        log::warn!("ingest.auth is \"open\": whoever reaches this server can record on it");
    }
    let (address, handle, serving) = listen(&config, doors, watchdog)?;
    log::info!("listening address={address}");
    tell_service_manager(NotifyState::Ready);
    end_with_its_panic("repair of what an earlier run left", actix_rt::spawn(recovery::go_on(store.clone(), remaining)));
    Ok(Server { address, admin_key, mint, store, registry, starter: starter.map(|(starter, _)| starter), pipeline_log, hasher, handle, serving })
}

impl Server {
    /// Stops: no more connections, every track sealed, every row final. Takes at most 10 s.
    pub async fn stop(self) {
        tell_service_manager(NotifyState::Stopping);
        self.handle.pause().await;
        // What ends now ends on purpose.
        if let Some(starter) = &self.starter
            && let Err(error) = starter.send(StopStarting).await
        {
            log::error!("the starter of egresses is gone error={error}");
        }
        match tokio::time::timeout(TRACKS_DEADLINE, self.registry.send(StopTracks)).await {
            Ok(Ok(())) => log::info!("every track is sealed"),
            Ok(Err(error)) => log::error!("tracks were not sealed: the registry is gone error={error}"),
            Err(_) => log::error!("tracks were not sealed in time"),
        }
        // What it has not done yet, it does after the next start.
        self.hasher.stop();
        self.handle.stop(true).await;
        match self.serving.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => log::error!("the HTTP server failed error={error}"),
            Err(error) => log::error!("the HTTP server failed error={error}"),
        }
        let log = self.pipeline_log;
        let written = tokio::task::spawn_blocking(move || log.finish());
        if tokio::time::timeout(LOG_DEADLINE, written).await.is_err() {
            log::error!("the pipeline log was not written in time");
        }
        log::info!("stopped");
    }
}

/// The memory for audio that waits, in the words of whoever has to choose its size.
fn spool(config: &Config) -> SpoolBudget {
    let bytes = config.ingest.spool;
    let tracks = bytes / PcmFormat::LIVEKIT.bytes_in(SPOOL_PER_TRACK);
    log::info!("audio that waits for the disk has room for {} s of {tracks} tracks of 48 kHz stereo spool_bytes={bytes}", SPOOL_PER_TRACK.as_secs());
    SpoolBudget::new(bytes)
}

/// Lets what waits in the journal follow to the database, for as long as the process lives. Its panic ends that, as an actor's.
fn replay_into(registry: &Addr<SessionRegistry>, journal: Journal, store: Store) {
    let registry = registry.clone();
    let tell = move |replayed| -> futures_util::future::BoxFuture<'static, ()> {
        let told = registry.send(EventsReplayed(replayed));
        Box::pin(async move {
            if let Err(error) = told.await {
                log::error!("the registry is gone error={error}");
            }
        })
    };
    end_with_its_panic("replay of the journal", actix_rt::spawn(replay::run(journal, store, Box::new(tell))));
}

/// The server API, where it can be called.
fn livekit(config: &Config) -> Option<Arc<LiveKit>> {
    let (url, (key, secret)) = config.livekit.url.as_ref().zip(config.livekit.api_key.as_ref().zip(config.secrets.livekit_api_secret.as_ref()))?;
    let access = LiveKitAccess { url: url.clone(), api_key: key.clone(), api_secret: secret.clone(), timeout: config.livekit.request_timeout };
    Some(Arc::new(LiveKit::new(&access)))
}

/// Where egresses are to send their audio, if this server starts them.
fn autopilot(config: &Config) -> Option<String> {
    if !config.livekit.autopilot {
        log::info!("tracks are not recorded by themselves: livekit.autopilot is false");
        return None;
    }
    let missing = config.livekit.missing_for_autopilot(&config.ingest);
    if !missing.is_empty() {
        log::warn!("tracks are not recorded by themselves: {} is not set", missing.join(" and "));
        return None;
    }
    if let Some(base) = &config.ingest.ws_base {
        log::info!("every published track is recorded, as the rules say, by an egress to {base}");
    }
    config.ingest.ws_base.clone()
}

fn key(set: Option<Secret>, dir: &Path, name: &'static str) -> Result<Secret, StartError> {
    if let Some(key) = set {
        return Ok(key);
    }
    let kept = keys::load_or_make(dir, name);
    let KeptKey { key, path, is_new } =
        kept.map_err(|cause| StartError::File { what: "cannot keep a key in", path: dir.join(name).display().to_string(), cause })?;
    if is_new {
        log::info!("made a new key path={}", path.display());
    }
    Ok(key)
}

fn webhook_verifier(config: &Config) -> Option<WebhookVerifier> {
    let keys = &config.secrets.livekit_keys;
    if keys.is_empty() {
        log::warn!("neither LIVEKIT_API_KEY and LIVEKIT_API_SECRET nor LIVEKIT_KEYS are set: every webhook is refused");
        return None;
    }
    Some(WebhookVerifier::new(keys.iter().map(|(key, secret)| (key.as_str(), secret.expose()))))
}

fn service(config: &Config) -> Result<Service, StartError> {
    if !config.analysis.enabled {
        log::info!("nothing is analysed: analysis.enabled is false");
        return Ok(Service::Nobody("analysis.enabled is false"));
    }
    // A key without a URL does not pass the configuration.
    let Some((key, url)) = config.secrets.hume_api_key.clone().zip(config.hume.url.clone()) else {
        log::info!("streaming to Hume is skipped: HUME_API_KEY is missing");
        return Ok(Service::Nobody("HUME_API_KEY is missing"));
    };
    Ok(Service::Streaming(AnalysisService {
        wire: Arc::new(HumeLegacy),
        url,
        key,
        tls: tls::client_config(config.hume.ca_file.as_deref()).map_err(StartError::Tls)?,
        gate: Arc::new(CredentialGate::new(config.hume.refused_retry)),
        queue: config.hume.queue,
    }))
}

type Listening = (SocketAddr, ServerHandle, JoinHandle<std::io::Result<()>>);

fn listen(config: &Config, doors: web::Data<Doors>, watchdog: Watchdog) -> Result<Listening, StartError> {
    let http = config.http.clone();
    let wanted = format!("{}:{}", http.host, http.port);
    let error = |cause| StartError::Listen { address: wanted.clone(), cause };
    let workers = http.workers.unwrap_or_else(|| std::thread::available_parallelism().map_or(2, usize::from));
    let descriptors = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let max_connections = http.max_connections.min(connections_with(descriptors, workers));
    if max_connections < http.max_connections {
        log::info!("connections are limited by open files each_worker={max_connections} open_files={}", descriptors.unwrap_or_default());
    }
    let routes = http.clone();
    let server = HttpServer::new(move || {
        let http = routes.clone();
        watchdog.watch_this_thread();
        App::new().app_data(doors.clone()).configure(move |config| http::routes(config, &http))
    })
    .workers(workers)
    .max_connections(max_connections)
    .client_request_timeout(HEAD_DEADLINE)
    .shutdown_timeout(CONNECTIONS_DEADLINE_SECONDS)
    .disable_signals()
    .on_connect(move |connection, data| {
        if let Some(stream) = connection.downcast_ref::<actix_web::rt::net::TcpStream>() {
            set_timeouts(stream);
            if let Some(handle) = SocketHandle::of(stream, descriptors) {
                data.insert(handle);
            }
        }
    })
    .bind((http.host.as_str(), http.port))
    .map_err(error)?;
    let address = server.addrs().first().copied().ok_or_else(|| error(std::io::ErrorKind::AddrNotAvailable.into()))?;
    let server = server.run();
    let handle = server.handle();
    Ok((address, handle, actix_rt::spawn(server)))
}
