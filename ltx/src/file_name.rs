//! The name of a file: `MIN-MAX.ltx`, both as TXIDs in text form. Names sort like transactions.

use crate::types::Txid;

/// The length of a name: two TXIDs of 16 digits, the dash and `.ltx`.
const LEN: usize = 16 + 1 + 16 + 4;

/// The name of the file of the transactions from `min` to `max`.
pub fn file_name(min: Txid, max: Txid) -> String {
    format!("{min}-{max}.ltx")
}

/// The first and the last transaction of the file `name`; `None` if it is not the name of an LTX
/// file, such as that of a temporary one, or of one that none can follow.
pub fn parse_file_name(name: &str) -> Option<(Txid, Txid)> {
    let digits = |part: &str| part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if name.len() != LEN || !name.is_ascii() {
        return None;
    }
    let (min, max) = name.strip_suffix(".ltx")?.split_once('-')?;
    let (min, max): (Txid, Txid) =
        (digits(min) && digits(max)).then_some((min.parse().ok()?, max.parse().ok()?))?;
    (max <= Txid::MAX).then_some((min, max))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_two_txids() {
        let name = "00000000000000ab-7fffffffffffffff.ltx";
        assert_eq!(file_name(Txid(0xab), Txid::MAX), name);
        assert_eq!(parse_file_name(name), Some((Txid(0xab), Txid::MAX)));
    }

    #[test]
    fn other_names_are_not_taken() {
        for name in [
            "",
            "0000000000000001-0000000000000001.ltx.tmp",
            "0000000000000001-0000000000000001.LTX",
            "00000000000000AB-00000000000000ab.ltx",
            "0000000000000001_0000000000000001.ltx",
            "000000000000001-00000000000000001.ltx",
            "000000000000000g-0000000000000001.ltx",
            "000000000000000é-000000000000001.ltx",
            "0000000000000001-8000000000000000.ltx",
        ] {
            assert_eq!(parse_file_name(name), None, "{name}");
        }
    }
}
