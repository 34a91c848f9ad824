//! Many files of one database as one: the newest image of each page, and the ends of the chain.
//!
//! Pages come out in order by merging the inputs, one buffered page each; the memory is one page an
//! input. Pages past the size of the result are dropped. A page that a later input cut off, and that
//! nobody wrote since, is the zero page it would be in a database.

use std::io::{Read, Write};

use crate::decoder::Decoder;
use crate::encoder::Encoder;
use crate::error::Error;
use crate::header::{Compression, Header, Trailer};
use crate::types::{Checksum, NodeId, Pgno};

/// An input, its next page read.
struct Input<R: Read> {
    decoder: Decoder<R>,
    page: Vec<u8>,
    /// The number of the page in `page`; `None` after the last.
    pgno: Option<Pgno>,
}

impl<R: Read> Input<R> {
    fn new(source: R) -> Result<Input<R>, Error> {
        let decoder = Decoder::new(source)?;
        let page = vec![0; decoder.header().page_size.bytes()];
        Ok(Input { decoder, page, pgno: None })
    }

    fn advance(&mut self) -> Result<(), Error> {
        self.pgno = self.decoder.next_page(&mut self.page)?;
        Ok(())
    }
}

/// Writes one file to `out` that does what `inputs` do one after the other.
///
/// The inputs, in any order, must be a chain: one page size, no gap and no overlap, each made on the
/// state that the one before it left. The result has the last one's time, and neither WAL fields nor
/// a node.
pub fn compact<R: Read, W: Write>(
    inputs: Vec<R>,
    out: W,
    compression: Compression,
) -> Result<(Header, Trailer), Error> {
    let mut inputs = inputs.into_iter().map(Input::new).collect::<Result<Vec<_>, _>>()?;
    inputs.sort_by_key(|input| input.decoder.header().min_txid);
    let headers: Vec<Header> = inputs.iter().map(|input| *input.decoder.header()).collect();
    let mut encoder = Encoder::new(out, merged_header(&headers, compression)?)?;
    merge(&mut inputs, &mut encoder)?;
    let post_apply = finish(inputs, &headers)?;
    let header = *encoder.header();
    let (mut out, trailer) = encoder.finish(post_apply)?;
    out.flush().map_err(Error::Write)?;
    Ok((header, trailer))
}

/// The header of the result; checks what headers alone can tell.
fn merged_header(headers: &[Header], compression: Compression) -> Result<Header, Error> {
    let (Some(first), Some(last)) = (headers.first(), headers.last()) else {
        return Err(Error::CompactNothing);
    };
    for (before, after) in headers.iter().zip(&headers[1..]) {
        if before.page_size != after.page_size {
            return Err(Error::CompactPageSize(before.page_size, after.page_size));
        }
        if before.max_txid.0.checked_add(1) != Some(after.min_txid.0) {
            return Err(Error::CompactGap { previous: before.max_txid, next: after.min_txid });
        }
    }
    Ok(Header {
        compression,
        max_txid: last.max_txid,
        commit: last.commit,
        timestamp_ms: last.timestamp_ms,
        wal_offset: 0,
        wal_size: 0,
        wal_salt1: 0,
        wal_salt2: 0,
        node_id: NodeId(0),
        ..*first
    })
}

fn merge<R: Read, W: Write>(
    inputs: &mut [Input<R>],
    encoder: &mut Encoder<W>,
) -> Result<(), Error> {
    let Header { commit, page_size, .. } = *encoder.header();
    let zeros = vec![0; page_size.bytes()];
    inputs.iter_mut().try_for_each(Input::advance)?;
    while let Some(pgno) = inputs.iter().filter_map(|input| input.pgno).min() {
        if pgno.0 <= commit {
            encoder.page(pgno, newest(inputs, pgno).unwrap_or(&zeros))?;
        }
        let mut same = inputs.iter_mut().filter(|input| input.pgno == Some(pgno));
        same.try_for_each(Input::advance)?;
    }
    Ok(())
}

/// The newest image of page `pgno`; `None` if it was cut off after that.
fn newest<R: Read>(inputs: &[Input<R>], pgno: Pgno) -> Option<&[u8]> {
    let index = inputs.iter().rposition(|input| input.pgno == Some(pgno))?;
    let cut_off = inputs[index..].iter().any(|input| input.decoder.header().commit < pgno.0);
    (!cut_off).then_some(&inputs[index].page)
}

/// Ends all inputs and checks that each starts where the one before it ends; the end of the last.
fn finish<R: Read>(inputs: Vec<Input<R>>, headers: &[Header]) -> Result<Checksum, Error> {
    let mut post = Checksum::NONE;
    for (i, (input, header)) in inputs.into_iter().zip(headers).enumerate() {
        if i > 0 && header.pre_apply != post {
            let txid = header.min_txid.previous();
            return Err(Error::CompactChain { txid, post, pre: header.pre_apply });
        }
        post = input.decoder.finish()?.post_apply;
    }
    Ok(post)
}
