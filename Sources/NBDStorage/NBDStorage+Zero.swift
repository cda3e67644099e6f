import DiskImage
import Glibc
import ImageStorage
import Synchronization

/// Making ranges zero: by the cheapest means that the server has.
extension NBDStorage {
    /// How much one request zeroes, in bytes: a server may take long over it.
    private static let zeroReach: Int64 = 1 << 30
    /// After how many attempts in vain nothing is trimmed any more. One says little: what is shorter than the server's
    /// blocks, or lies across their borders, stays.
    private static let vainTrims = 8

    public func zero(_ range: Range<Int64>, mayUnmap: Bool) async throws {
        guard !range.isEmpty else { return }
        guard range.upperBound <= size else { throw beyondExport(range) }
        let block = facts.minimumBlock
        let start = range.lowerBound.roundedUp(to: block)
        let end = max(start, range.upperBound.roundedDown(to: block))
        guard start < end else { return try await writeZeros(range) }
        try await writeZeros(range.lowerBound..<start)
        let reach = max(block, Self.zeroReach.roundedDown(to: block))
        var position = start
        while position < end {
            let next = min(end, position + reach)
            try await zeroBlocks(position..<next, mayUnmap: mayUnmap)
            position = next
        }
        try await writeZeros(end..<range.upperBound)
    }

    /// Where zeros would have to be written, by the server or by us, a range that may become a hole is trimmed
    /// instead. What was trimmed may hold anything, so the server has to say that it is zero.
    private func zeroBlocks(_ range: Range<Int64>, mayUnmap: Bool) async throws {
        guard mayUnmap else { return try await zeroPlainly(range, .allocated) }
        if facts.canZero, !facts.canFastZero { return try await zeroPlainly(range, .asServerLikes) }
        if facts.canZero, try await zeroFast(range) { return }
        for rest in try await trim(range) { try await zeroPlainly(rest, .asServerLikes) }
    }

    private func zeroPlainly(_ range: Range<Int64>, _ manner: NBDRequest.ZeroManner) async throws {
        guard facts.canZero else { return try await writeZeros(range) }
        try await change([
            NBDRequest(.zero(count: Int64(range.count), manner), at: range.lowerBound)
        ])
    }

    /// - Returns: whether the server did it.
    private func zeroFast(_ range: Range<Int64>) async throws -> Bool {
        guard !refusesFastZero.load(ordering: .relaxed) else { return false }
        do {
            try await zeroPlainly(range, .onlyFast)
            return true
        } catch let error as ImageError where error.kind == .system(errno: ENOTSUP) {
            refusesFastZero.store(true, ordering: .relaxed)
            return false
        }
    }

    /// - Returns: the parts that are not zero now, as far as the server says.
    private func trim(_ range: Range<Int64>) async throws -> [Range<Int64>] {
        // One connection need not know at once what was done on another, unless the server promises it.
        let isConfirmable = facts.canBlockStatus && (facts.canMultiConn || connections.count == 1)
        guard facts.canTrim, isConfirmable, keptTrims.load(ordering: .relaxed) < Self.vainTrims
        else {
            return [range]
        }
        do {
            try await change([NBDRequest(.trim(count: Int64(range.count)), at: range.lowerBound)])
        } catch is ImageError {
            // Nothing is lost by that: what stands in its way stands in that of a write, too, or is of no concern.
            keptTrims.store(Self.vainTrims, ordering: .relaxed)
            return [range]
        }
        let rest = try await notZero(range)
        if rest == [range] {
            keptTrims.add(1, ordering: .relaxed)
        } else {
            keptTrims.store(0, ordering: .relaxed)
        }
        return rest
    }

    /// Asks anew, whatever was known of the range before.
    ///
    /// - Returns: the parts of which the server does not say that they are zero.
    private func notZero(_ range: Range<Int64>) async throws -> [Range<Int64>] {
        var parts: [Range<Int64>] = []
        var answer = NBDBlockStatus()
        var position = range.lowerBound
        while position < range.upperBound {
            var extent = answer.extent(at: position, limit: range.upperBound)
            if extent == nil {
                answer = try await blockStatus(position..<range.upperBound)
                extent = answer.extent(at: position, limit: range.upperBound)
            }
            guard let extent else { return parts + [position..<range.upperBound] }
            if extent.content != .zero { parts.append(extent.range) }
            position = extent.range.upperBound
        }
        return parts
    }

    private func writeZeros(_ range: Range<Int64>) async throws {
        guard !range.isEmpty else { return }
        let zeros = IOBuffer.zeros(byteCount: Int(min(Int64(range.count), pieceSize)))
        var position = range.lowerBound
        while position < range.upperBound {
            let count = min(range.upperBound - position, pieceSize)
            try await write(zeros.bytes.extracting(0..<Int(count)), at: position)
            position += count
        }
    }
}
