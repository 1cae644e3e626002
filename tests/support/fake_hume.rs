//! Hume's legacy v0 streaming service, as far as `docs/FACTS.md`, Hume documents it, with its limits enforced.
//!
//! Owns a listener and its connections, all of them tasks of the current Tokio runtime, which end when [`FakeHume`] is dropped.
//! One watched [`State`] holds what was seen and how to behave, so that a test can wait for anything without polling.
//! "Socket reference" is the vendor's page on `wss://api.hume.ai/v0/stream/models`.

use std::io::Cursor;
use std::net::{Ipv4Addr, SocketAddr, TcpListener as StdListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::{SinkExt, StreamExt};
use hound::{SampleFormat, WavReader, WavSpec};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{sleep, sleep_until, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::server::{ErrorResponse, Request, Response};
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, frame::coding::CloseCode};
use tokio_tungstenite::{WebSocketStream, accept_hdr_async};

/// The service's path (socket reference).
pub const PATH: &str = "/v0/stream/models";
/// The 48 prosody names in the service's order (hume-python-sdk, `empathic_voice/types/emotion_scores.py`).
const EMOTIONS: &str = "Admiration, Adoration, Aesthetic Appreciation, Amusement, Anger, Anxiety, Awe, Awkwardness, \
    Boredom, Calmness, Concentration, Confusion, Contemplation, Contempt, Contentment, Craving, Desire, Determination, \
    Disappointment, Disgust, Distress, Doubt, Ecstasy, Embarrassment, Empathic Pain, Entrancement, Envy, Excitement, Fear, \
    Guilt, Horror, Interest, Joy, Love, Nostalgia, Pain, Pride, Realization, Relief, Romance, Sadness, Satisfaction, Shame, \
    Surprise (negative), Surprise (positive), Sympathy, Tiredness, Triumph";
/// Longest audio in one payload: E0203 past it (dev.hume.ai/docs/resources/errors).
const MAX_AUDIO_MS: u64 = 5_000;
/// Range of `stream_window_ms` (socket reference).
const STREAM_WINDOW_MS: std::ops::RangeInclusive<f64> = 500.0..=10_000.0;
/// Handshakes taken within one second (docs/FACTS.md, Hume, second-hand); 429 past it.
const HANDSHAKES_PER_SECOND: usize = 50;
/// Longest wait of a test, and for a client's Close; past it [`FakeHume::wait_until`] panics and says for what.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Clone, Debug)]
pub struct FakeHumeOptions {
    pub api_key: String,
    /// Serve `wss://localhost` with a certificate of the fake's own CA, see [`FakeHume::ca_pem`].
    pub tls: bool,
    /// Closes a connection that sends no message for so long. Hume: one minute (docs/FACTS.md, Hume, second-hand).
    pub idle_close: Duration,
    /// How long each handshake is left unanswered.
    pub accept_delay: Duration,
}

impl Default for FakeHumeOptions {
    fn default() -> Self {
        let (idle_close, accept_delay) = (Duration::from_secs(60), Duration::ZERO);
        Self { api_key: "fake-hume-key".to_owned(), tls: false, idle_close, accept_delay }
    }
}

/// One answered handshake.
#[derive(Clone, Copy, Debug)]
pub struct HandshakeSeen {
    /// 101, or what it was refused with.
    pub status: u16,
    pub at: Instant,
}

/// One message without audio that was accepted.
#[derive(Clone, Debug, PartialEq)]
pub struct Configuration {
    pub connection: usize,
    pub message: Value,
}

/// One message with audio that was accepted. `connection` counts from 0 in the order of accepted handshakes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Payload {
    pub connection: usize,
    pub payload_id: Option<String>,
    /// Interleaved.
    pub samples: Vec<i16>,
    pub sample_rate: u32,
    pub channels: u16,
}

/// Everything seen so far.
#[derive(Clone, Debug, Default)]
pub struct State {
    pub handshakes: Vec<HandshakeSeen>,
    /// Handshakes accepted.
    pub connections: usize,
    /// Connections open now.
    pub open: usize,
    pub configurations: Vec<Configuration>,
    pub payloads: Vec<Payload>,
    /// Codes found, E…; recorded also while the fake is silent or answers garbage.
    pub errors: Vec<&'static str>,
    /// Codes found, W….
    pub warnings: Vec<&'static str>,
    refuse_with: Option<u16>,
    silent: bool,
    garbage: bool,
    drops: usize,
}

pub struct FakeHume {
    address: SocketAddr,
    ca_pem: Option<String>,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

struct Shared {
    options: FakeHumeOptions,
    state: watch::Sender<State>,
}

impl FakeHume {
    /// Listens on a free port of 127.0.0.1. Must be called within a Tokio runtime of any flavour.
    pub fn start(options: FakeHumeOptions) -> Self {
        let listener = StdListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        listener.set_nonblocking(true).expect("a socket can be non-blocking");
        let address = listener.local_addr().expect("a bound socket has an address");
        let (ca_pem, tls) = options.tls.then(certificates).unzip();
        let shared = Arc::new(Shared { options, state: watch::Sender::default() });
        let listener = TcpListener::from_std(listener).expect("the runtime has I/O enabled");
        let accepting = tokio::spawn(Arc::clone(&shared).accept(listener, tls));
        Self { address, ca_pem, shared, accepting }
    }

    pub fn url(&self) -> String {
        let (scheme, host) = if self.ca_pem.is_some() { ("wss", "localhost") } else { ("ws", "127.0.0.1") };
        format!("{scheme}://{host}:{}{PATH}", self.address.port())
    }

    /// The CA to trust. Panics without TLS.
    pub fn ca_pem(&self) -> &str {
        self.ca_pem.as_deref().expect("the fake was started with `tls: true`")
    }

    /// Refuses every further handshake with this HTTP status.
    pub fn refuse_with(&self, status: Option<u16>) {
        self.change(|state| state.refuse_with = status);
    }

    /// Ends all open connections without a Close frame.
    pub fn drop_all(&self) {
        self.change(|state| state.drops += 1);
    }

    /// Takes and records everything, but replies to nothing.
    pub fn go_silent(&self, silent: bool) {
        self.change(|state| state.silent = silent);
    }

    /// Replies to everything with text that is not JSON.
    pub fn answer_garbage(&self, garbage: bool) {
        self.change(|state| state.garbage = garbage);
    }

    pub fn handshakes(&self) -> Vec<HandshakeSeen> {
        self.state().handshakes
    }

    pub fn payloads(&self) -> Vec<Payload> {
        self.state().payloads
    }

    pub fn errors(&self) -> Vec<&'static str> {
        self.state().errors
    }

    pub fn state(&self) -> State {
        self.shared.state.borrow().clone()
    }

    /// Waits until what was seen satisfies the predicate. Panics after 20 s.
    pub async fn wait_until(&self, what: &str, predicate: impl Fn(&State) -> bool) {
        let mut changes = self.shared.state.subscribe();
        if timeout(PATIENCE, changes.wait_for(predicate)).await.is_err() {
            let State { handshakes, open, configurations, payloads, errors, warnings, .. } = self.state();
            let statuses: Vec<u16> = handshakes.iter().map(|handshake| handshake.status).collect();
            panic!(
                "waited {PATIENCE:?} for {what}; seen: handshakes {statuses:?}, {open} open, {} configurations, {} payloads, \
                 errors {errors:?}, warnings {warnings:?}",
                configurations.len(),
                payloads.len()
            );
        }
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        self.shared.state.send_modify(change);
    }
}

impl Drop for FakeHume {
    fn drop(&mut self) {
        self.accepting.abort(); // and with it the set of its connections
    }
}

impl Shared {
    async fn accept(self: Arc<Self>, listener: TcpListener, tls: Option<TlsAcceptor>) {
        let mut connections = JoinSet::new();
        loop {
            let (stream, _) = listener.accept().await.expect("the listener lives");
            let (shared, tls) = (Arc::clone(&self), tls.clone());
            connections.spawn(async move {
                match tls {
                    None => shared.handshake(stream).await,
                    Some(tls) => match tls.accept(stream).await {
                        Ok(stream) => shared.handshake(stream).await,
                        Err(error) => eprintln!("fake hume: the client gave up on TLS: {error}"),
                    },
                }
            });
        }
    }

    #[expect(clippy::result_large_err, reason = "tungstenite's callback type")]
    async fn handshake<S: AsyncRead + AsyncWrite + Unpin>(&self, stream: S) {
        sleep(self.options.accept_delay).await;
        let mut accepted = None;
        let judge = |request: &Request, response: Response| -> Result<Response, ErrorResponse> {
            let mut status = 101;
            self.state.send_modify(|state| {
                status = self.status(state, request);
                state.handshakes.push(HandshakeSeen { status, at: Instant::now() });
                if status == 101 {
                    accepted = Some(Open { shared: self, connection: state.connections, drops: state.drops });
                    state.connections += 1;
                    state.open += 1;
                }
            });
            if status == 101 {
                return Ok(response);
            }
            let body = json!({ "error": "refused by the fake" }).to_string();
            let answer = Response::builder().status(status).header("Content-Type", "application/json");
            Err(answer.header("Content-Length", body.len()).body(Some(body)).map_err(drop).expect("a valid status"))
        };
        let socket = accept_hdr_async(stream, judge).await;
        if let (Ok(socket), Some(open)) = (socket, accepted) {
            open.serve(socket).await;
        }
    }

    /// The answer to a handshake, `state` being that before it.
    fn status(&self, state: &State, request: &Request) -> u16 {
        let key = request.headers().get("X-Hume-Api-Key").map(|key| key.as_bytes());
        let last_second = state.handshakes.iter().filter(|handshake| handshake.at.elapsed() < Duration::from_secs(1));
        match state.refuse_with {
            Some(status) => status,
            None if request.uri().path() != PATH => 404,
            None if key != Some(self.options.api_key.as_bytes()) => 401,
            None if last_second.count() >= HANDSHAKES_PER_SECOND => 429,
            None => 101,
        }
    }
}

/// One accepted connection; its drop, also by an abort, takes it off [`State::open`].
struct Open<'a> {
    shared: &'a Shared,
    connection: usize,
    /// [`State::drops`] at the handshake.
    drops: usize,
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.shared.state.send_modify(|state| state.open -= 1);
    }
}

impl Open<'_> {
    async fn serve<S: AsyncRead + AsyncWrite + Unpin>(self, mut socket: WebSocketStream<S>) {
        let idle_close = self.shared.options.idle_close;
        let mut changes = self.shared.state.subscribe();
        let mut idle_at = tokio::time::Instant::now() + idle_close;
        loop {
            let message = tokio::select! {
                message = socket.next() => message,
                () = async { changes.wait_for(|state| state.drops != self.drops).await.map(drop).expect("the sender lives") } => return,
                () = sleep_until(idle_at) => {
                    // 1000 is one of the codes seen (docs/FACTS.md, Hume, second-hand). A client that is gone already does not matter.
                    let frame = CloseFrame { code: CloseCode::Normal, reason: "inactivity".into() };
                    socket.close(Some(frame)).await.ok();
                    timeout(PATIENCE, async { while let Some(Ok(_)) = socket.next().await {} }).await.ok();
                    return;
                }
            };
            let Some(Ok(message)) = message else { return };
            if !(message.is_text() || message.is_binary()) {
                continue; // tungstenite answers pings and Closes itself, and neither counts as activity
            }
            idle_at = tokio::time::Instant::now() + idle_close;
            let reply = self.reply(&message);
            let (silent, garbage) = {
                let state = self.shared.state.borrow();
                (state.silent, state.garbage)
            };
            if silent {
                continue;
            }
            let text = if garbage { "<html>502 Bad Gateway".to_owned() } else { reply.to_string() };
            if socket.send(Message::text(text)).await.is_err() {
                return;
            }
        }
    }

    /// Judges one message, records what it held and makes the reply.
    fn reply(&self, message: &Message) -> Value {
        let parsed: Option<Value> = if let Message::Text(text) = message { serde_json::from_str(text).ok() } else { None };
        let payload_id = parsed.as_ref().and_then(|message| message.get("payload_id")).and_then(Value::as_str).map(str::to_owned);
        let job_details = json!({ "job_id": format!("fake-job-{}", self.connection) }); // a new job on each connection [INF]
        let Some(parsed) = parsed else { return self.fault(E0100, payload_id, job_details) };
        let (spec, samples) = match understand(&parsed) {
            Err(fault) => return self.fault(fault, payload_id, job_details),
            Ok(None) => {
                let seen = Configuration { connection: self.connection, message: parsed };
                self.shared.state.send_modify(|state| state.configurations.push(seen));
                return json!({ "job_details": job_details });
            }
            Ok(Some(audio)) => audio,
        };
        let silent = samples.iter().all(|sample| *sample == 0);
        let prediction = prediction(spec, &samples);
        let (connection, id) = (self.connection, payload_id.clone());
        let seen = Payload { connection, payload_id: id, samples, sample_rate: spec.sample_rate, channels: spec.channels };
        self.shared.state.send_modify(|state| {
            state.payloads.push(seen);
            state.warnings.extend(silent.then_some("W0105"));
        });
        if silent {
            let warning = "No speech detected."; // code and meaning: docs/FACTS.md, Hume, second-hand
            return json!({ "warning": warning, "code": "W0105", "payload_id": payload_id, "job_details": job_details });
        }
        json!({ "payload_id": payload_id, "job_details": job_details, "prosody": { "predictions": [prediction] } })
    }

    fn fault(&self, (code, error): Fault, payload_id: Option<String>, job_details: Value) -> Value {
        self.shared.state.send_modify(|state| state.errors.push(code));
        json!({ "error": error, "code": code, "payload_id": payload_id, "job_details": job_details })
    }
}

/// Code and text; the codes' meanings are the vendor's (dev.hume.ai/docs/resources/errors), the texts ours.
type Fault = (&'static str, &'static str);
const E0100: Fault = ("E0100", "The message is not a JSON text.");

/// Checks a message against the socket reference. `None` is one without audio, which configures or asks for job details.
fn understand(message: &Value) -> Result<Option<(WavSpec, Vec<i16>)>, Fault> {
    let fields = message.as_object().ok_or(("E0101", "The message is not an object."))?;
    for (key, value) in fields {
        let fits = match key.as_str() {
            "data" | "payload_id" => value.is_string(),
            "models" => *value == json!({ "prosody": {} }), // this fake has no other model, and configures none
            "stream_window_ms" => value.as_f64().is_some_and(|window| STREAM_WINDOW_MS.contains(&window)),
            "reset_stream" | "raw_text" | "job_details" => value.is_boolean(),
            _ => return Err(("E0101", "Extra inputs are not permitted")),
        };
        if !fits {
            return Err(("E0101", "A field has the wrong type or value."));
        }
    }
    let has = |key| fields.contains_key(key);
    match fields.get("data").and_then(Value::as_str) {
        None if has("models") || has("job_details") || has("reset_stream") => Ok(None),
        None => Err(("E0101", "The message asks for nothing.")),
        Some(_) if !has("models") => Err(("E0101", "No model is chosen for the data.")),
        Some(_) if fields.get("raw_text") == Some(&Value::Bool(true)) => Err(("E0102", "Prosody does not apply to text.")),
        Some(data) => decode(data).map(Some),
    }
}

fn decode(data: &str) -> Result<(WavSpec, Vec<i16>), Fault> {
    const UNREADABLE: Fault = ("E0200", "The media is not a 16-bit PCM WAV file.");
    let file = STANDARD.decode(data).map_err(|_| ("E0201", "The data is not base64."))?;
    let wav = WavReader::new(Cursor::new(file)).map_err(|_| UNREADABLE)?;
    let (spec, frames) = (wav.spec(), u64::from(wav.duration()));
    if spec.bits_per_sample != 16 || spec.sample_format != SampleFormat::Int || spec.sample_rate == 0 {
        return Err(UNREADABLE);
    }
    let samples = wav.into_samples().collect::<Result<Vec<i16>, _>>().map_err(|_| UNREADABLE)?;
    if samples.is_empty() {
        return Err(("E0202", "No audio signal was found."));
    }
    if frames * 1_000 > MAX_AUDIO_MS * u64::from(spec.sample_rate) {
        return Err(("E0203", "The audio is longer than 5000 ms."));
    }
    Ok((spec, samples))
}

/// One prediction for the whole payload. Score n of 48 is n/48 of the RMS, 1 being full scale, so the last name carries the RMS itself.
fn prediction(spec: WavSpec, samples: &[i16]) -> Value {
    let mean_square = samples.iter().map(|sample| f64::from(*sample).powi(2)).sum::<f64>() / samples.len() as f64;
    let rms = mean_square.sqrt() / 32_768.0;
    let seconds = samples.len() as f64 / f64::from(spec.channels) / f64::from(spec.sample_rate);
    let emotions: Vec<Value> = (1..).zip(EMOTIONS.split(", ")).map(|(n, name)| json!({ "name": name, "score": rms * f64::from(n) / 48.0 })).collect();
    json!({ "time": { "begin": 0.0, "end": seconds }, "emotions": emotions })
}

/// The PEM of a fresh CA, and a server that shows a certificate for `localhost` signed by it.
fn certificates() -> (String, TlsAcceptor) {
    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.distinguished_name.push(DnType::CommonName, "Fake Hume CA");
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate().expect("ring makes keys")).expect("the CA signs itself");
    let key = KeyPair::generate().expect("ring makes keys");
    let server = CertificateParams::new(["localhost".to_owned()]).expect("localhost is a valid name");
    let certificate = server.signed_by(&key, &authority).expect("the CA signs");
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("ring supports the default TLS versions")
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key.into())
        .expect("key and certificate belong together");
    (authority.pem(), TlsAcceptor::from(Arc::new(config)))
}
