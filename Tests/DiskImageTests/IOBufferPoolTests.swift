import DiskImage
import Testing

struct IOBufferPoolTests {
    private func address(_ buffer: borrowing IOBuffer) -> UInt {
        buffer.bytes.withUnsafeBytes { UInt(bitPattern: $0.baseAddress) }
    }

    @Test func buffersUsedLastAreTakenFirst() {
        let pool = IOBufferPool()
        let one = pool.take(byteCount: 4096)
        let two = pool.take(byteCount: 4096)
        let (first, second) = (address(one), address(two))
        #expect(first != second)
        pool.giveBack(one)
        pool.giveBack(two)
        let three = pool.take(byteCount: 4096)
        let four = pool.take(byteCount: 100)
        let found = [address(three), address(four)]
        #expect(found == [second, first])
    }

    @Test func aBufferThatIsTooSmallIsNotTaken() {
        let pool = IOBufferPool()
        pool.giveBack(IOBuffer(byteCount: 4096))
        let taken = pool.take(byteCount: 4097)
        #expect(taken.byteCount == 4097)
    }
}
