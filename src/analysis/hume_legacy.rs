//! Hume's legacy streaming wire, the predecessor's contract: base64 WAV in JSON, answered by prosody predictions.
//!
//! Hume itself switched its endpoint off in June 2026 (dev.hume.ai, expression measurement overview); proxies and self-hosted services speak it.
//! Shapes and limits: `docs/FACTS.md`, Hume, from the vendor's SDKs.

use std::io::Cursor;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::json;

use super::{Prediction, Reply, SPEECH_RATE, SpeechSlice, WireFormat, WireMessage};

/// The longest audio in one payload (error E0203).
const MAX_SLICE: Duration = Duration::from_millis(5_000);

#[derive(Debug, Clone, Copy)]
pub struct HumeLegacy;

impl WireFormat for HumeLegacy {
    fn service(&self) -> &'static str {
        "hume"
    }

    fn kind(&self) -> &'static str {
        "prosody"
    }

    fn opening(&self) -> Option<WireMessage> {
        Some(WireMessage::Text(json!({"models": {"prosody": {}}}).to_string()))
    }

    fn max_slice(&self) -> Duration {
        MAX_SLICE
    }

    fn key_header(&self) -> &'static str {
        "X-Hume-Api-Key"
    }

    fn encode(&self, slice: &SpeechSlice, payload: &str) -> WireMessage {
        // Nothing is sticky on this wire: the models go with every payload.
        let message = json!({"models": {"prosody": {}}, "data": STANDARD.encode(wav(&slice.samples)), "payload_id": payload});
        WireMessage::Text(message.to_string())
    }

    fn decode(&self, text: &[u8]) -> Reply {
        let Ok(reply) = serde_json::from_slice::<RawReply>(text) else { return Reply::Unknown };
        let payload = reply.payload_id;
        let worded = |text: String| reply.code.as_ref().map_or(text.clone(), |code| format!("{code} {text}"));
        match (reply.error, reply.warning, reply.prosody) {
            (Some(error), ..) => Reply::Refused { payload, text: worded(error) },
            (None, Some(warning), _) => Reply::Warning { payload, text: worded(warning) },
            (None, None, Some(prosody)) => {
                let predictions = prosody.predictions.unwrap_or_default().into_iter().map(Prediction::from).collect();
                Reply::Measured { payload, predictions }
            }
            (None, None, None) if reply.job_details.is_some() => Reply::Acknowledged,
            (None, None, None) => Reply::Unknown,
        }
    }
}

/// A 16 kHz mono WAV file in memory.
fn wav(samples: &[i16]) -> Vec<u8> {
    let spec = hound::WavSpec { channels: 1, sample_rate: SPEECH_RATE, bits_per_sample: 16, sample_format: hound::SampleFormat::Int };
    let mut file = Cursor::new(Vec::with_capacity(44 + 2 * samples.len()));
    let write = |file: &mut Cursor<Vec<u8>>| {
        let mut writer = hound::WavWriter::new(file, spec)?;
        let mut block = writer.get_i16_writer(u32::try_from(samples.len()).unwrap_or(u32::MAX));
        for sample in samples {
            block.write_sample(*sample);
        }
        block.flush()?;
        writer.finalize()
    };
    write(&mut file).expect("writing to memory cannot fail");
    file.into_inner()
}

#[derive(Deserialize)]
struct RawReply {
    payload_id: Option<String>,
    error: Option<String>,
    warning: Option<String>,
    code: Option<String>,
    prosody: Option<RawProsody>,
    job_details: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct RawProsody {
    predictions: Option<Vec<RawPrediction>>,
}

#[derive(Deserialize)]
struct RawPrediction {
    time: RawTime,
    emotions: Vec<RawEmotion>,
}

#[derive(Deserialize)]
struct RawTime {
    begin: f64,
    end: f64,
}

#[derive(Deserialize)]
struct RawEmotion {
    name: String,
    score: f64,
}

impl From<RawPrediction> for Prediction {
    fn from(raw: RawPrediction) -> Self {
        let scores = raw.emotions.into_iter().map(|emotion| (emotion.name, emotion.score)).collect();
        Self { begin_s: raw.time.begin, end_s: raw.time.end, scores }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_is_a_wav_that_hound_reads_back() {
        let slice = SpeechSlice { start_ms: 0, samples: vec![1, -2, 300] };
        let WireMessage::Text(text) = HumeLegacy.encode(&slice, "p1") else { panic!("text") };
        let message: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(message["models"], json!({"prosody": {}}));
        assert_eq!(message["payload_id"], "p1");
        let file = STANDARD.decode(message["data"].as_str().expect("text")).expect("base64");
        let reader = hound::WavReader::new(file.as_slice()).expect("a WAV file");
        assert_eq!((reader.spec().sample_rate, reader.spec().channels), (16_000, 1));
        assert_eq!(reader.into_samples::<i16>().map(|sample| sample.expect("a sample")).collect::<Vec<_>>(), slice.samples);
    }

    #[test]
    fn replies_are_told_apart() {
        let decode = |value: serde_json::Value| HumeLegacy.decode(value.to_string().as_bytes());
        let payload = Some("p".to_owned());
        let prediction = json!({"time": {"begin": 0.0, "end": 2.0}, "emotions": [{"name": "Joy", "score": 0.5}]});
        let predictions = vec![Prediction { begin_s: 0.0, end_s: 2.0, scores: vec![("Joy".to_owned(), 0.5)] }];
        let cases = [
            (json!({"payload_id": "p", "prosody": {"predictions": [prediction]}}), Reply::Measured { payload: payload.clone(), predictions }),
            (json!({"payload_id": "p", "prosody": {}}), Reply::Measured { payload: payload.clone(), predictions: vec![] }),
            (
                json!({"warning": "no speech", "code": "W0105", "payload_id": "p"}),
                Reply::Warning { payload: payload.clone(), text: "W0105 no speech".into() },
            ),
            (json!({"error": "too long", "code": "E0203", "payload_id": "p"}), Reply::Refused { payload, text: "E0203 too long".into() }),
            (json!({"job_details": {"job_id": "j"}}), Reply::Acknowledged),
            (json!({"surprise": 1}), Reply::Unknown),
            (json!([1]), Reply::Unknown),
        ];
        for (message, reply) in cases {
            assert_eq!(decode(message.clone()), reply, "{message}");
        }
        assert_eq!(HumeLegacy.decode(b"\xff"), Reply::Unknown);
    }
}
