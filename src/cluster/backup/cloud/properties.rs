//! The answers of a server that keeps backups, whatever stands in them.

use ltx::Pos;

use super::{POSITION_MISMATCH, Said, TEXT_CHARS_MAX, positions_in, said_in};
use crate::http::report::HaltPos;

/// The bytes as positions and as a refusal.
pub fn backup(bytes: &[u8]) {
    match positions_in(bytes) {
        Ok(positions) => {
            let text: Vec<_> = positions.iter().map(|(name, pos)| entry(name, *pos)).collect();
            let again = positions_in(format!("{{{}}}", text.join(",")).as_bytes());
            assert_eq!(again, Ok(positions));
        }
        Err(text) => assert!(!text.is_empty()),
    }
    match said_in(bytes) {
        Said::Mismatch(pos) => {
            let pos = serde_json::to_string(&HaltPos::new(pos)).expect("texts encode");
            let again = format!(r#"{{"code":"{POSITION_MISMATCH}","pos":{pos}}}"#);
            assert_eq!(said_in(again.as_bytes()), said_in(bytes));
        }
        Said::NoPosition => {}
        Said::Text(text) => {
            assert!(text.chars().count() <= TEXT_CHARS_MAX && !text.contains('\n'));
        }
    }
}

fn entry(name: &str, pos: Pos) -> String {
    let name = serde_json::to_string(name).expect("a text encodes");
    format!("{name}:{}", serde_json::to_string(&HaltPos::new(pos)).expect("texts encode"))
}
