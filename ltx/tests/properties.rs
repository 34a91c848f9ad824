//! What holds for all bytes, whatever they are. The fuzz target and the replay of its inputs share
//! this file.

use std::io::{self, Cursor};

use ltx::{AnyReader, Compression, Decoder, Encoder, Error, Header};

/// Reads `bytes` in every way there is. What is accepted can be written again, says the same, and
/// is accepted by every other reader.
pub fn read(bytes: &[u8]) {
    let verified = ltx::verify(bytes);
    if let Ok((header, trailer)) = &verified {
        for compression in [Compression::None, Compression::Lz4] {
            let again = rewrite(bytes, compression).expect("an accepted file can be written");
            let (other, other_trailer) =
                ltx::verify(&again[..]).expect("what we write is accepted");
            assert_eq!(Header { compression: header.compression, ..other }, *header);
            assert_eq!(other_trailer.post_apply, trailer.post_apply);
        }
        assert!(AnyReader::new(Cursor::new(bytes)).is_ok(), "also a variant of the format");
    }
    let materialized = ltx::materialize(bytes, io::sink());
    let snapshot = verified.is_ok_and(|(header, _)| header.is_snapshot());
    assert_eq!(materialized.is_ok(), snapshot);
    if let Ok(mut reader) = AnyReader::new(Cursor::new(bytes)) {
        let mut page = vec![0; reader.header().page_size.bytes()];
        while reader.next_page(&mut page).expect("it was verified").is_some() {}
        reader.finish().expect("it was verified");
    }
}

fn rewrite(bytes: &[u8], compression: Compression) -> Result<Vec<u8>, Error> {
    let mut decoder = Decoder::new(bytes)?;
    let mut page = vec![0; decoder.header().page_size.bytes()];
    let mut encoder = Encoder::new(Vec::new(), Header { compression, ..*decoder.header() })?;
    while let Some(pgno) = decoder.next_page(&mut page)? {
        encoder.page(pgno, &page)?;
    }
    Ok(encoder.finish(decoder.finish()?.post_apply)?.0)
}
